"""Pair sets out to other tools, and log-probs made elsewhere in."""

from dpo_cache.exchange.export import ExportReport, export_pairs
from dpo_cache.exchange.import_ import ImportReport, import_pairs

__all__ = ["ExportReport", "ImportReport", "export_pairs", "import_pairs"]
