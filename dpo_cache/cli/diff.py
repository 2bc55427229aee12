"""`dpo-cache diff`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from dpo_cache.cli.output import command_line, count, print_json, print_text
from dpo_cache.cli.parameters import command
from dpo_cache.options.upkeep import DiffOptions

if TYPE_CHECKING:
    from dpo_cache.store.upkeep.diff import DiffReport, ScoreDifference


@command(DiffOptions, json_help="Print the differences as JSON.")
def diff_command(options: DiffOptions, as_json: bool) -> None:
    """Show how two caches differ: references, completions, pair sets, values beyond rounding.

    The exit code is 0 if they are equal, and 1 if they differ or on an error, which is printed on stderr.
    """
    from dpo_cache.store.upkeep.diff import diff_caches

    report = diff_caches(options.a, options.b)
    if as_json:
        content = {**asdict(report), "equal": report.is_equal}
        for entry in content["scores"].values():  # JSON has no infinity
            entry["largest_gap"] = entry["largest_gap"] if math.isfinite(entry["largest_gap"]) else None
        print_json(content)
    else:
        _print_report(report)
    if not report.is_equal:
        raise typer.Exit(1)


def _print_report(report: DiffReport) -> None:
    for name, cache, references, pair_sets in (
        ("A", report.a, report.references_only_a, report.pair_sets_only_a),
        ("B", report.b, report.references_only_b, report.pair_sets_only_b),
    ):
        for reference_id in references:
            print_text(f"only in {name} ({cache}): reference {reference_id[:12]}")
        for pair_set in pair_sets:
            print_text(f"only in {name} ({cache}): pair set {pair_set}")
    for reference_id, scores in report.scores.items():
        print_text(f"reference {reference_id[:12]}: {_describe(scores)}")
    for pair_set, lines in report.pair_sets.items():
        print_text(f"pair set {pair_set} differs (A and B):")
        for line in lines:
            print_text(f"  {line}")
    if report.is_equal:
        print_text(f"{report.a} and {report.b} hold the same.")
    else:
        following = command_line("merge", report.a, report.b, "DEST")
        print_text(f"{report.a} and {report.b} differ. Next, for all of both: {following}")


def _describe(scores: ScoreDifference) -> str:
    text = (
        f"{count(scores.only_a)} completions only in A, {count(scores.only_b)} only in B, "
        f"{count(scores.both)} in both"
    )
    if not scores.differing:
        return text
    is_finite = math.isfinite(scores.largest_gap)
    gap = f"by up to {scores.largest_gap:.2g} nats a token" if is_finite else "in their number of tokens"
    return f"{text}, {count(scores.differing)} of them differ {gap}"
