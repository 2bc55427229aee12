"""`dpo-cache merge`."""

from __future__ import annotations

from dataclasses import asdict

from dpo_cache.cli.output import (
    SAME_COMMAND,
    command_line,
    count,
    format_bytes,
    print_json,
    print_table,
    print_text,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import MergeOptions


@command(MergeOptions)
def merge_command(options: MergeOptions, as_json: bool) -> None:
    """Copy everything that a cache lacks from other caches: the union of all.

    The order of the sources does not matter, and a second merge copies nothing. Every file is checked against
    its digest.
    """
    when_stopped(f"the files that were copied stay. {SAME_COMMAND}")
    from dpo_cache.upkeep import merge

    report = merge(**asdict(options), progress=True)
    if as_json:
        print_json(asdict(report))
        return
    rows = [
        ("files copied", f"{count(report.copied_files)} ({format_bytes(report.copied_bytes)})"),
        ("new references", ", ".join(entry[:12] for entry in report.references) or "none"),
        ("new pair sets", ", ".join(report.pair_sets) or "none"),
    ]
    rows += [("renamed", f"{before} -> {after}") for before, after in report.renamed.items()]
    rows += [("other of that name left out", name) for name in report.kept]
    rows += [
        ("other values left out", f"of {count(number)} completions of reference {reference[:12]}")
        for reference, number in report.overruled.items()
    ]
    print_table(f"{report.cache}: merged from {', '.join(options.sources)}", rows)
    print_text(f"{report.cache} holds all of them. Next: {command_line('ls', report.cache)}")
