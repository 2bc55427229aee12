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

if TYPE_CHECKING:
    from dpo_cache.options.upkeep import CopyOptions
    from dpo_cache.store.upkeep.copy import TransferProgress, TransferReport


def copy(options: CopyOptions, source: str, target: str, *, verb: str, as_json: bool) -> TransferReport:
    """Copy and print the report, but for the next command."""
    from dpo_cache.store import open_cache
    from dpo_cache.store.upkeep.copy import copy_cache

    with ProgressLine(verb) as line:

        def show(progress: TransferProgress) -> None:
            files = f"{count(progress.num_files)}/{count(progress.total_files)} files"
            done = f"{format_bytes(progress.num_bytes)} of {format_bytes(progress.total_bytes)}"
            rate = f"{progress.bytes_per_s / 1e6:.1f} MB/s  {format_seconds(progress.seconds_left)} left"
            line.update(progress.num_bytes, max(progress.total_bytes, 1), f"{files}  {done}  {rate}")

        opened = open_cache(source)
        report = copy_cache(
            opened,
            open_cache(target, create=True),
            pairs=options.pairs,
            references=options.reference,
            replace=options.replace,
            on_progress=show,
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
