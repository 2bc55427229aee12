"""`dpo-cache gc`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dpo_cache.cli.output import (
    command_line,
    count,
    format_bytes,
    print_columns,
    print_json,
    print_text,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import GcOptions
from dpo_cache.progress import format_seconds

if TYPE_CHECKING:
    from dpo_cache.store.upkeep.gc import Garbage


@command(GcOptions, json_help="Print the unneeded files as JSON.")
def gc_command(options: GcOptions, as_json: bool) -> None:
    """Remove files that nothing needs: lists them, and with --yes removes them.

    Those are parts that no manifest names, references that no pair set was scored by, temporary files of
    killed writers, and files that `verify --repair` moved aside. Pair sets stay: `rm` removes those.
    """
    if options.yes:
        when_stopped("some files may be removed already. Next: the same command, which removes the rest.")
    from dpo_cache.store import open_cache
    from dpo_cache.store.upkeep.gc import collect_garbage, find_unneeded

    cache = open_cache(options.cache)
    chosen: dict[str, Any] = {"keep": options.keep, "scores": options.scores, "grace_s": options.grace}
    removed = collect_garbage(cache, **chosen) if options.yes else []
    unneeded = find_unneeded(cache, **chosen)
    garbage = removed if options.yes else unneeded.garbage
    freed = sum(entry.bytes for entry in garbage)
    if as_json:
        entries, recent = ([asdict(entry) for entry in found] for found in (garbage, unneeded.recent))
        outcome = {"cache": str(cache), "removed": options.yes, "bytes": freed}
        print_json({**outcome, "garbage": entries, "recent": recent})
        return
    _print_files("file", garbage)
    _print_files("recent, stays", unneeded.recent)
    _print_outcome(str(cache), garbage, unneeded.recent, options)


def _print_files(title: str, entries: Sequence[Garbage]) -> None:
    if entries:
        rows = [(entry.file, format_bytes(entry.bytes), entry.why) for entry in entries]
        print_columns((title, "size", "why"), rows)


def _print_outcome(
    cache: str, garbage: Sequence[Garbage], recent: Sequence[Garbage], options: GcOptions
) -> None:
    if recent:
        verb, pronoun = ("is", "it") if len(recent) == 1 else ("are", "them")
        print_text(
            f"{_sum(recent)} that nothing needs {verb} younger than {format_seconds(options.grace)}: a run "
            f"may be about to use {pronoun}."
        )
    following = command_line("ls", cache)
    if options.yes:
        print_text(f"{cache}: {_sum(garbage)} removed. Next: {following}")
    elif garbage:
        print_text(
            f"{cache}: {_sum(garbage)} can be removed. Nothing was removed. Next: the same command with --yes"
        )
    else:
        print_text(
            f"{cache}: nothing to drop that is older than {format_seconds(options.grace)}. Next: {following}"
        )


def _sum(entries: Sequence[Garbage]) -> str:
    size = format_bytes(sum(entry.bytes for entry in entries))
    return f"{count(len(entries))} file{'' if len(entries) == 1 else 's'}, {size}"
