"""The report of `evaluate` as HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_cache.errors import shown_bytes
from dpo_cache.evaluation.measures import Accuracy, LengthGroup, Spread
from dpo_cache.notebook.html import card, facts, folded, remarks, table
from dpo_cache.progress import format_seconds, format_share

if TYPE_CHECKING:
    from dpo_cache.evaluation.report import EvalReport


def eval_html(report: EvalReport) -> str:
    """Loss, accuracy and calibration; unfolded sections show rewards, accuracy by length, and cost."""
    moved, gap = report.logratio_per_token, report.gap
    limited = f" of {report.pairs_in_set:,}" if report.num_pairs < report.pairs_in_set else ""
    error = report.calibration.expected_error
    rows = [
        ("pairs", f"{report.num_pairs:,}{limited}"),
        ("loss", f"{report.metrics['loss']:.4f} ({' + '.join(report.loss)}, beta {report.beta:g})"),
        ("settings of", report.run or ""),
        ("accuracy", _describe(report.accuracy)),
        ("mean margin", f"{report.margin.mean:+.4f}"),
        ("calibration error", "-" if error is None else f"{error:.4f}"),
        (
            "moved from the reference",
            f"{moved['chosen']:+.4f} nats a token of chosen, {moved['rejected']:+.4f} of rejected answers",
        ),
        (
            "largest gap from the reference",
            f"{gap.largest:.2g} nats ({gap.num_beyond:,} of {gap.num_completions:,} answers beyond rounding)",
        ),
        ("one line a pair", report.output or ""),
    ]
    cost = [
        ("reference", report.reference[:12]),
        ("computed with", f"{report.dtype}, {report.device}, attention: {report.attention}"),
        ("tokens run", f"{report.model_tokens:,} of {report.data_tokens:,} in the data"),
        ("time", f"{format_seconds(report.elapsed_s)}, {report.pairs_per_s:.1f} pairs/s"),
        ("peak memory", shown_bytes(report.peak_bytes)),
    ]
    return card(
        f"{report.model} on {report.pairs}",
        facts(rows),
        folded("rewards", _spreads(report)),
        folded("accuracy by length and by plain log-probs", *_groups(report)),
        folded("cost", facts(cost)),
        remarks(report.remarks),
    )


def _describe(accuracy: Accuracy) -> str:
    ties = f"{accuracy.ties:,} of {accuracy.count:,} pairs tied" if accuracy.ties else ""
    if accuracy.share is None:
        return f"- ({ties})"
    interval = f"95% interval {format_share(accuracy.low)} to {format_share(accuracy.high)}"
    return f"{format_share(accuracy.share)} ({', '.join(filter(None, (interval, ties)))})"


def _spreads(report: EvalReport) -> str:
    def row(name: str, spread: Spread) -> list[str]:
        percentiles = (spread.p5, spread.median, spread.p95)
        return [
            name,
            f"{spread.mean:+.4f}",
            f"{spread.deviation:.4f}",
            *(f"{one:+.4f}" for one in percentiles),
        ]

    spreads = {"chosen": report.chosen_reward, "rejected": report.rejected_reward, "margin": report.margin}
    titles = ("reward", "mean", "deviation", "5%", "median", "95%")
    return table(titles, [row(*entry) for entry in spreads.items()])


def _groups(report: EvalReport) -> list[str]:
    def one(title: str, groups: Sequence[LengthGroup]) -> str:
        cells = [
            [
                group.name,
                f"{group.least:,} to {group.most:,}",
                f"{group.accuracy.count:,}",
                format_share(group.accuracy.share),
                f"{group.margin:+.4f}",
            ]
            for group in groups
        ]
        return table((title, "tokens", "pairs", "accuracy", "margin"), cells)

    plain = [[name, format_share(accuracy.share)] for name, accuracy in report.comparisons.items()]
    return [
        one("by which answer is longer", report.by_longer_answer),
        one("by both answers", report.by_answer_tokens),
        one("by prompt", report.by_prompt_tokens),
        table(("by log-probs without a reward", "accuracy"), plain),
    ]
