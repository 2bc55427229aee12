"""`dpo-cache gc`."""

from __future__ import annotations

from dataclasses import asdict

from dpo_cache.cli.output import (
    command_line,
    count,
    format_bytes,
    print_columns,
    print_json,
    print_text,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import GcOptions


@command(GcOptions, json_help="Print what goes as JSON.")
def gc_command(options: GcOptions, as_json: bool) -> None:
    """Remove files that nothing needs: lists them, and with --yes removes them.

    Those are parts that no manifest names, references that no pair set was scored by, temporary files of
    killed writers, and what `verify --repair` moved aside. Pair sets stay: `rm` removes those.
    """
    from dpo_cache.store import open_cache
    from dpo_cache.store.upkeep.gc import collect_garbage, find_garbage

    cache = open_cache(options.cache)
    act = collect_garbage if options.yes else find_garbage
    garbage = act(cache, keep=options.keep, scores=options.scores, grace_s=options.grace)
    freed = sum(entry.bytes for entry in garbage)
    if as_json:
        entries = [asdict(entry) for entry in garbage]
        print_json({"cache": str(cache), "removed": options.yes, "bytes": freed, "garbage": entries})
        return
    if garbage:
        print_columns(
            ("file", "size", "why"), [(entry.file, format_bytes(entry.bytes), entry.why) for entry in garbage]
        )
    what = f"{count(len(garbage))} file{'' if len(garbage) == 1 else 's'}, {format_bytes(freed)}"
    following = command_line("ls", str(cache))
    if options.yes:
        print_text(f"{cache}: {what} removed. Next: {following}")
    elif garbage:
        print_text(f"{cache}: {what} could go. Nothing was removed. Next: the same command with --yes")
    else:
        print_text(f"{cache}: nothing to drop that is older than {options.grace:g} s. Next: {following}")
