"""The report of `precompute` as HTML, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.errors import shown_bytes
from dpo_cache.notebook.html import card, facts, remarks
from dpo_cache.progress import format_seconds

if TYPE_CHECKING:
    from dpo_cache.precomputing.report import PrecomputeReport


def precompute_html(report: PrecomputeReport) -> str:
    """Rows, completions, tokens and cost of the run."""
    dropped = sorted(report.dropped.items(), key=lambda entry: -entry[1])
    gap = report.audit_largest_gap
    rows = [
        ("cache", report.cache),
        ("reference", report.reference[:12]),
        ("rows read", f"{report.rows_read:,}"),
        ("pairs kept", f"{report.pairs_kept:,}"),
        *((f"dropped: {reason}", f"{number:,}") for reason, number in dropped),
        ("rows truncated", f"{report.rows_truncated:,}" if report.rows_truncated else ""),
        (
            "completions",
            f"{report.completions:,}, {report.distinct_completions:,} of them distinct: "
            f"{report.already_cached:,} already cached, {report.scored_now:,} scored now",
        ),
        ("tokens", f"{report.data_tokens:,} in the data, {report.model_tokens:,} run"),
        (
            "audited",
            "" if gap is None else f"{report.audited:,} completions, largest gap {gap:.1e} nats a token",
        ),
        ("time", f"{format_seconds(report.elapsed_s)}, {report.pairs_per_s:.1f} pairs/s"),
        ("peak memory", shown_bytes(report.peak_bytes)),
        ("written", shown_bytes(report.bytes_written)),
    ]
    return card(f"Precompute: {', '.join(report.pair_sets)}", facts(rows), remarks(report.remarks))
