"""`dpo-cache ls`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from dpo_cache.cli.following import suggest
from dpo_cache.cli.output import (
    command_line,
    count,
    format_bytes,
    print_columns,
    print_json,
    print_table,
    print_text,
    remark,
)
from dpo_cache.cli.parameters import command
from dpo_cache.errors import NotInCacheError
from dpo_cache.options.upkeep import LsOptions

if TYPE_CHECKING:
    from dpo_cache.store.upkeep.contents import Contents, PairSetEntry, ReferenceEntry

PROBLEMS = {"damage": "damaged", "unreadable": "unreadable"}  # fields of entries, and the words shown
LONG = 100  # characters of a value that are shown; --json has all of it


@command(LsOptions, json_help="Print the contents as JSON.")
def ls_command(options: LsOptions, as_json: bool) -> None:
    """List the references of a cache with their scores, and its pair sets.

    Reads only footers, so it is fast and does not check values; `verify` does.
    """
    from dpo_cache.store.upkeep.contents import read_contents

    contents = read_contents(options.cache)
    if options.name:
        _show_one(contents, options.name, as_json)
    elif as_json:
        print_json(asdict(contents))
    else:
        _print_contents(contents)
    for kind in PROBLEMS:
        for problem in _problems(contents, kind):
            remark(f"{PROBLEMS[kind]}: {problem}")


def _print_contents(contents: Contents) -> None:
    references = [
        (
            entry.id[:12],
            _model(entry),
            ", ".join(word for word in (entry.dtype, entry.quantization) if word) or "?",
            count(entry.completions),
            count(entry.tokens),
            format_bytes(entry.bytes),
            count(entry.shards) + _mark(entry),
        )
        for entry in contents.references
    ]
    if references:
        print_columns(("reference", "model", "dtype", "completions", "tokens", "size", "shards"), references)
        print_text()
    pair_sets = [
        (
            entry.name,
            count(entry.rows),
            (entry.reference or "?")[:12],
            entry.source or "?",
            entry.created or "?",
            format_bytes(entry.bytes) + _mark(entry),
        )
        for entry in contents.pair_sets
    ]
    if pair_sets:
        print_columns(("pair set", "pairs", "reference", "source", "made", "size"), pair_sets)
        print_text()
    held = f"{_number(contents.references, 'reference')}, {_number(contents.pair_sets, 'pair set')}"
    if other := contents.other:
        held += f", {count(len(other))} other files of {format_bytes(sum(other.values()))}"
    print_text(f"{contents.cache} holds {held}: {format_bytes(contents.bytes)}. Next: {_next(contents)}")


def _model(entry: ReferenceEntry) -> str:
    """The model's name when it was scored, or the name that the user gave to the model of imported
    log-probs.
    """
    imported = (entry.document or {}).get("identity", {}).get("imported")
    return f"{imported} (imported)" if imported else entry.model or "?"


def _next(contents: Contents) -> str:
    if any(_problems(contents, kind) for kind in PROBLEMS):
        return command_line("verify", contents.cache)
    if contents.pair_sets:
        references = {entry.name: entry.reference for entry in contents.pair_sets}
        return suggest(contents.cache, references, references)[0]
    return command_line("precompute", "--cache", contents.cache, "--model", "MODEL", "--dataset", "DATA")


def _number(entries: list, noun: str) -> str:
    return f"{count(len(entries))} {noun}{'' if len(entries) == 1 else 's'}"


def _mark(entry: ReferenceEntry | PairSetEntry) -> str:
    """The word for an entry's problem, as the end of a cell."""
    return next((f" {word}" for kind, word in PROBLEMS.items() if getattr(entry, kind)), "")


def _problems(contents: Contents, kind: str) -> list[str]:
    entries: list[Contents | ReferenceEntry | PairSetEntry] = [
        contents,
        *contents.references,
        *contents.pair_sets,
    ]
    return [problem for entry in entries for problem in getattr(entry, kind)]


def _show_one(contents: Contents, name: str, as_json: bool) -> None:
    """Print a pair set or a reference with everything in its JSON file."""
    pair_sets = [entry for entry in contents.pair_sets if f"{entry.name}/".startswith(f"{name}/")]
    references = [] if pair_sets else [entry for entry in contents.references if entry.id.startswith(name)]
    found: list[ReferenceEntry | PairSetEntry] = [*references, *pair_sets]
    if not found:
        known = [entry.name for entry in contents.pair_sets]
        known += [entry.id[:12] for entry in contents.references]
        raise NotInCacheError(
            f"{contents.cache}: neither a pair set nor a reference {name!r}.\n"
            f"It holds: {', '.join(known) or 'nothing'}."
        )
    if as_json:
        print_json(
            {
                "cache": contents.cache,
                "references": [asdict(entry) for entry in references],
                "pair_sets": [asdict(entry) for entry in pair_sets],
            }
        )
        return
    for values in map(asdict, found):
        title = values.pop("id", None) or values.pop("name")
        document = values.pop("document", None) or values.pop("manifest", None) or {}
        for kind in PROBLEMS:
            del values[kind]
        more = [(key, value) for key, value in _flatten(document) if key.split(".")[0] not in values]
        print_table(title, [(key, _plain(value)) for key, value in [*values.items(), *more]])


def _flatten(document: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in document.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return count(value)
    text = value if isinstance(value, str) and "\n" not in value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"
