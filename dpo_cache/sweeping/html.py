"""The report of `sweep` as HTML, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.notebook.html import card, facts, folded, note, remarks, table
from dpo_cache.progress import format_seconds
from dpo_cache.reporting.runs import table_cells

if TYPE_CHECKING:
    from dpo_cache.sweeping.run import SweepReport


def sweep_html(report: SweepReport) -> str:
    """The table of the runs, as in table.md, with its notes and the errors of failed runs."""
    failed = f", {report.num_failed:,} failed" if report.num_failed else ""
    return card(
        f"Sweep {report.output}: {report.num_finished:,} of {report.num_runs:,} runs finished{failed}",
        table(*table_cells(report.rows)) if report.rows else "",
        *(note(f"{row.name} failed: {row.error}") for row in report.rows if row.error),
        facts([("table", report.table), ("time", format_seconds(report.elapsed_s))]),
        folded("about the table", *map(note, report.notes)) if report.notes else "",
        remarks(report.remarks),
    )
