"""What `dpo-cache pull` and `dpo-cache push` share."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dpo_cache.cli.output import (
    ProgressLine,
    command_line,
    count,
    format_bytes,
    format_seconds,
    print_json,
    print_table,
)
from dpo_cache.progress import show_transfer

if TYPE_CHECKING:
    from dpo_cache.options.upkeep import CopyOptions
    from dpo_cache.store.upkeep.copy import TransferReport


def copy(options: CopyOptions, source: str, target: str, *, verb: str, as_json: bool) -> TransferReport:
    """Copy, and print the report without the next command."""
    from dpo_cache.store import open_cache
    from dpo_cache.store.upkeep.copy import copy_cache

    with ProgressLine(verb) as line:
        opened = open_cache(source)
        report = copy_cache(
            opened,
            open_cache(target, create=True),
            pairs=options.pairs,
            references=options.reference,
            overwrite=options.overwrite,
            on_progress=lambda progress: show_transfer(line, progress),
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)
    return report


def train_hint(cache: str, report: TransferReport) -> str:
    """The command that uses the copy."""
    if report.pair_sets:
        return command_line("train", "--cache", cache, "--pairs", report.pair_sets[0], "--output", "RUN")
    return command_line("ls", cache)


def _print_report(report: TransferReport) -> None:
    scored = set(report.scored_references)
    rows = [
        ("pair sets", ", ".join(report.pair_sets) or "none"),
        (
            "references",
            ", ".join(
                entry[:12] + ("" if entry in scored else " (without its scores)")
                for entry in report.references
            ),
        ),
        ("sent", f"{count(report.files_sent)} files, {format_bytes(report.bytes_sent)}"),
        ("there already", f"{count(report.files_present)} files, {format_bytes(report.bytes_present)}"),
        ("time", format_seconds(report.elapsed_s)),
    ]
    print_table(f"{report.source} -> {report.target}", rows)
