"""`dpo-cache eval`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dpo_cache.cli.output import (
    ProgressLine,
    count,
    format_bytes,
    format_seconds,
    is_verbose,
    print_columns,
    print_json,
    print_table,
    print_text,
    remark,
    show_scoring,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.log import phase
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.run_losses import describe_losses, with_run
from dpo_cache.progress import format_share

if TYPE_CHECKING:
    from dpo_cache.evaluation.measures import Accuracy, LengthGroup, Spread
    from dpo_cache.evaluation.report import EvalReport


@command(EvalOptions, complete=lambda given: with_run(given, remark))
def eval_command(options: EvalOptions, as_json: bool) -> None:
    """Measure how well a model separates chosen answers from rejected ones: loss, accuracy, margins,
    calibration, by length.

    The reference's log-probs come from the cache: only the evaluated model is loaded. The cache is not
    changed.
    """
    from dpo_cache.planning.start import check_eval

    check_eval(options)
    when_stopped("nothing was written.")
    with ProgressLine("evaluating") as line:
        with phase("importing libraries"):
            from dpo_cache.evaluation import evaluate

        report = evaluate(
            **asdict(options), on_progress=lambda progress: show_scoring(line, progress), log=line.remark
        )
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)


def _print_report(report: EvalReport) -> None:
    print_table(
        f"{report.pairs}: {report.model} compared with reference {report.reference[:12]}, {report.dtype}, "
        f"attention: {report.attention}",
        _results(report) + (_details(report) if is_verbose() else []),
    )
    if is_verbose():
        _print_spreads(report)
        _print_bins(report)
        _print_groups(report)
    if report.output:
        print_text(f"One line a pair is in {report.output}.")
    else:
        more = "" if is_verbose() else "--verbose for rewards, calibration and lengths in tables, "
        print_text(f"Next: the same command with {more}--output PAIRS.jsonl for one line a pair.")


def _results(report: EvalReport) -> list[tuple[str, str]]:
    limited = f" of {count(report.pairs_in_set)}" if report.num_pairs < report.pairs_in_set else ""
    calibration, margin = report.calibration, report.margin
    error = "-" if calibration.expected_error is None else f"{calibration.expected_error:.4f}"
    rows = [("pairs", count(report.num_pairs) + limited)]
    rows += [("loss", f"{report.metrics['loss']:.4f} ({describe_losses(report.loss, report.loss_settings)})")]
    rows += [("  settings of", report.run)] if report.run else []
    rows += [
        (f"  {name.removeprefix('loss/')}", f"{value:.4f}")
        for name, value in report.metrics.items()
        if name.startswith("loss/")
    ]
    compared = report.comparisons.items()
    shown = compared if is_verbose() else [entry for entry in compared if entry[0] == "reference logps"]
    return [
        *rows,
        ("accuracy", _describe(report.accuracy)),
        *((f"  by {name}", _describe(accuracy)) for name, accuracy in shown),
        (
            "margin",
            f"{margin.mean:+.4f} on average, {margin.p5:+.4f} to {margin.p95:+.4f} for 90% of the pairs",
        ),
        ("calibration error", error),
    ]


def _details(report: EvalReport) -> list[tuple[str, str]]:
    moved = report.logratio_per_token
    return [
        ("Brier score", f"{report.calibration.brier:.4f} (0.25: no information)"),
        (
            "moved from the reference",
            f"{moved['chosen']:+.4f} nats a token of chosen, {moved['rejected']:+.4f} of rejected answers",
        ),
        (
            "largest gap from it",
            f"{report.gap.largest:.2g} nats ({count(report.gap.num_beyond)} of "
            f"{count(report.gap.num_completions)} answers beyond rounding)",
        ),
        ("completions scored", count(report.num_completions)),
        ("tokens run", f"{count(report.model_tokens)} of {count(report.data_tokens)} in the data"),
        ("time", f"{format_seconds(report.elapsed_s)} ({report.pairs_per_s:.1f} pairs/s)"),
        ("peak memory", format_bytes(report.peak_bytes)),
    ]


def _describe(accuracy: Accuracy) -> str:
    if accuracy.share is None:
        return "- (margins are rounding noise)"
    ties = f", {count(accuracy.ties)} tied" if accuracy.ties else ""
    return f"{accuracy.share:.1%} (95% interval {_interval(accuracy)}{ties})"


def _interval(accuracy: Accuracy) -> str:
    return "-" if accuracy.low is None else f"{accuracy.low:.1%} to {accuracy.high:.1%}"


def _print_spreads(report: EvalReport) -> None:
    def row(name: str, spread: Spread) -> tuple[str, ...]:
        percentiles = (spread.p5, spread.p25, spread.median, spread.p75, spread.p95)
        return (
            name,
            f"{spread.mean:+.4f}",
            f"{spread.deviation:.4f}",
            *(f"{value:+.4f}" for value in percentiles),
        )

    print_text()
    spreads = {"chosen": report.chosen_reward, "rejected": report.rejected_reward, "margin": report.margin}
    print_columns(
        ("reward", "mean", "deviation", "5%", "25%", "median", "75%", "95%"),
        [row(*entry) for entry in spreads.items()],
    )


def _print_bins(report: EvalReport) -> None:
    rows = [
        (
            f"{entry.low:.2f} to {entry.high:.2f}",
            count(entry.count),
            "" if entry.predicted is None else f"{entry.predicted:.1%}",
            "" if not entry.count else format_share(entry.observed),
        )
        for entry in report.calibration.bins
    ]
    print_text()
    print_columns(("confidence", "pairs", "predicted", "right"), rows)


def _print_groups(report: EvalReport) -> None:
    def row(entry: LengthGroup) -> tuple[str, ...]:
        accuracy = entry.accuracy
        tokens = f"{count(entry.least)} to {count(entry.most)}"
        return (
            entry.name,
            tokens,
            count(accuracy.count),
            format_share(accuracy.share),
            _interval(accuracy),
            f"{entry.margin:+.4f}",
        )

    for title, groups in (
        ("by which is longer", report.by_longer_answer),
        ("by both answers", report.by_answer_tokens),
        ("by prompt", report.by_prompt_tokens),
    ):
        print_text()
        print_columns(
            (title, "tokens", "pairs", "accuracy", "95% interval", "margin"), [row(entry) for entry in groups]
        )
