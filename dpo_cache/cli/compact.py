"""`dpo-cache compact`."""

from __future__ import annotations

from dataclasses import asdict

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
from dpo_cache.options.upkeep import CompactOptions


@command(CompactOptions)
def compact_command(options: CompactOptions, as_json: bool) -> None:
    """Merge many score shards into few large ones, sorted by key.

    Other processes may read and write during this. A crash loses nothing; a compact cache is not changed.
    """
    when_stopped("nothing is lost. Next: the same command.")
    from dpo_cache.store import open_cache
    from dpo_cache.upkeep import compact

    cache = open_cache(options.cache)
    done = compact(cache, reference=options.reference)
    if as_json:
        print_json({"cache": str(cache), "references": [asdict(entry) for entry in done]})
        return
    rows = [
        (
            entry.reference[:12],
            f"{count(entry.shards_before)} -> {count(entry.shards_after)}",
            f"{format_bytes(entry.bytes_before)} -> {format_bytes(entry.bytes_after)}",
            count(entry.completions),
            count(entry.duplicates),
        )
        for entry in done
    ]
    if rows:
        print_columns(("reference", "shards", "size", "completions", "duplicates dropped"), rows)
    if num_left := sum(entry.left for entry in done):
        print_text(
            f"{count(num_left)} shards of runs of `dpo-cache precompute` stay as they are: the runs are at "
            "work, or were killed in an audit. Compact again when the next one has ended."
        )
    changed = sum(
        entry.shards_before != entry.shards_after or entry.bytes_before != entry.bytes_after for entry in done
    )
    what = (
        f"{count(changed)} of {count(len(done))} references compacted"
        if changed
        else "nothing to do, all is compact"
    )
    print_text(f"{cache}: {what}. Next: {command_line('ls', str(cache))}")
