"""`dpo-cache import`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dpo_cache.cli.following import following_lines
from dpo_cache.cli.output import (
    ProgressLine,
    count,
    format_bytes,
    kept_rows,
    print_json,
    print_table,
    print_text,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.log import phase
from dpo_cache.options.exchange import ImportOptions

if TYPE_CHECKING:
    from dpo_cache.exchange import ImportReport


@command(ImportOptions)
def import_command(options: ImportOptions, as_json: bool) -> None:
    """Import reference log-probs that another program computed, under a reference that you name.

    They are stored as they are: nothing is scored again. Every row is checked before anything is written.
    """
    from dpo_cache.planning.start import check_import

    check_import(options)
    when_stopped("no pair set was written. Next: the same command.")
    with ProgressLine("importing") as line:
        with phase("importing libraries"):
            from dpo_cache.exchange import import_pairs

        with phase("reading and checking the rows"):
            report = import_pairs(**asdict(options), log=line.remark)
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report, options.reference)


def _print_report(report: ImportReport, reference: str) -> None:
    rows = [
        *kept_rows(report),
        ("rows truncated", count(report.rows_truncated)),
        ("log-probs", "sums and per token" if report.has_token_logps else "sums only"),
        ("  mean of an answer", f"{report.mean_logps:.2f} nats"),
        ("  mean of a token", f"{report.mean_token_logps:.3f} nats"),
        ("written", format_bytes(report.bytes_written)),
    ]
    print_table(
        f"{', '.join(report.pair_sets)}: imported as {report.format}, reference {report.reference[:12]} "
        f"({reference})",
        rows,
    )
    print_text(f"The pairs are in {report.cache}. Next:")
    model = [] if report.start_from else ["--model", "MODEL"]
    for line in following_lines(report.cache, report.pair_sets, *model):
        print_text(f"  {line}")
