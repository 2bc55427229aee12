"""The report of `train` as HTML, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.errors import shown_bytes
from dpo_cache.losses.metrics import Metrics
from dpo_cache.notebook.html import card, facts, remarks, table
from dpo_cache.progress import format_seconds, format_share

if TYPE_CHECKING:
    from dpo_cache.training.output.report import TrainReport


def train_html(report: TrainReport) -> str:
    """Losses, evaluations, cost and path of the trained model."""
    ended = "a dry run" if report.is_dry_run else "finished" if report.finished else "stopped early"
    best = report.best if report.best and report.best["step"] != report.num_steps else None
    rows = [
        ("model", report.model or ""),
        ("pairs", f"{report.num_pairs:,}"),
        ("steps", f"{report.num_steps:,}"),
        ("parameters trained", f"{report.num_trained:,} of {report.num_parameters:,}"),
        ("best evaluation", f"{best['measure']} {best['value']:.4f} at step {best['step']}" if best else ""),
        ("best model", report.best_model or ""),
        ("time", format_seconds(report.elapsed_s)),
        ("peak memory", shown_bytes(report.peak_bytes)),
    ]
    measured = [
        ("first step", report.first, ""),
        ("last step", report.last, ""),
        ("evaluation before training", report.eval_before, "eval/"),
        ("evaluation of the saved model", report.eval_after, "eval/"),
    ]
    lines = [[name, *_cells(metrics, prefix)] for name, metrics, prefix in measured if metrics]
    return card(
        f"Run {report.output}: {ended}",
        facts(rows),
        table(("", "loss", "accuracy", "margin"), lines) if lines else "",
        remarks(report.remarks),
    )


def _cells(metrics: Metrics, prefix: str) -> tuple[str, str, str]:
    loss, share, margin = (
        metrics[f"{prefix}{name}"] for name in ("loss", "rewards/accuracies", "rewards/margins")
    )
    return f"{loss:.4f}", format_share(share), f"{margin:+.4f}"
