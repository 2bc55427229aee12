"""The reports of `export_pairs` and `import_pairs` as HTML, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.errors import shown_bytes
from dpo_cache.notebook.html import card, facts, remarks

if TYPE_CHECKING:
    from dpo_cache.exchange.export import ExportReport
    from dpo_cache.exchange.import_ import ImportReport


def export_html(report: ExportReport) -> str:
    """The file, its columns, and what it lacks."""
    rows = [
        ("file", report.out),
        ("format", report.format),
        ("pairs", f"{report.num_pairs:,}"),
        ("columns", ", ".join(report.columns)),
        ("left out", "; ".join(report.left_out)),
        ("written", shown_bytes(report.bytes_written)),
    ]
    return card(f"Export of {report.pairs}", facts(rows), remarks(report.remarks))


def import_html(report: ImportReport) -> str:
    """Rows, log-probs and the cache that has them now."""
    dropped = sorted(report.dropped.items(), key=lambda entry: -entry[1])
    rows = [
        ("cache", report.cache),
        ("reference", report.reference[:12]),
        ("format", report.format),
        ("rows read", f"{report.rows_read:,}"),
        ("pairs kept", f"{report.pairs_kept:,}"),
        *((f"dropped: {reason}", f"{number:,}") for reason, number in dropped),
        ("rows truncated", f"{report.rows_truncated:,}" if report.rows_truncated else ""),
        ("log-probs", "sums and per token" if report.has_token_logps else "only sums"),
        ("mean of an answer", f"{report.mean_logps:.2f} nats"),
        ("mean of a token", f"{report.mean_token_logps:.3f} nats"),
        ("written", shown_bytes(report.bytes_written)),
    ]
    return card(f"Import: {', '.join(report.pair_sets)}", facts(rows), remarks(report.remarks))
