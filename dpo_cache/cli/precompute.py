"""`dpo-cache precompute`."""

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
    show_scoring,
)
from dpo_cache.cli.parameters import command
from dpo_cache.options.precompute import PrecomputeOptions

if TYPE_CHECKING:
    from dpo_cache.data.survey import Finding, Survey
    from dpo_cache.precomputing.run import PrecomputeReport


@command(PrecomputeOptions, json_help="Print the report as JSON.")
def precompute_command(options: PrecomputeOptions, as_json: bool) -> None:
    """Run the frozen reference once over preference data and store its log-probs.

    Completions that the cache has are not scored again. Interrupted runs resume: give the same command
    again.
    """
    from dpo_cache.planning.start import check_precompute

    check_precompute(options)
    from dpo_cache.precomputing.run import precompute

    with ProgressLine("scoring") as line:

        def show_survey(survey: Survey) -> None:
            if not as_json:
                line.pause(lambda: _print_survey(survey))

        report = precompute(
            **asdict(options),
            on_survey=show_survey,
            on_progress=lambda progress: show_scoring(line, progress),
            log=line.remark,
        )
    if as_json:
        print_json(asdict(report))
    elif options.dry_run:
        _print_plan(report)
    else:
        _print_report(report)


def _print_plan(report: PrecomputeReport) -> None:
    missing = report.distinct_completions - report.already_cached
    rows = [
        ("pairs", count(report.pairs_kept)),
        ("distinct completions", count(report.distinct_completions)),
        ("  already cached", count(report.already_cached)),
        ("  to be scored", count(missing)),
        ("tokens to be run", f"{count(report.missing_tokens)} of {count(report.data_tokens)} in the data"),
    ]
    print_table(f"{', '.join(report.pair_sets)}: reference {report.reference[:12]}, a dry run", rows)
    print("Nothing was scored or written. Next: the same command without --dry-run.")


def _print_survey(survey: Survey) -> None:
    def found(finding: Finding) -> str:
        return f"{count(finding.count)} (row {finding.shown_rows()})"

    rows = [("rows", count(survey.rows_read)), ("pairs", count(survey.pairs_kept))]
    rows += [
        (f"dropped: {reason}", found(finding))
        for reason, finding in sorted(survey.dropped.items(), key=lambda entry: -entry[1].count)
    ]
    noted = {
        "truncated": survey.truncated,
        "duplicate rows": survey.duplicates,
        "contradictory rows": survey.contradictory,
        "answer starts early": survey.moved_boundary,
    }
    rows += [(name, found(finding)) for name, finding in noted.items() if finding.count]
    rows += [
        (f"tokens of {name}", "  ".join(f"{length:>6,}" for length in lengths))
        for name, lengths in survey.lengths().items()
    ]
    shared = 1 - survey.forest_tokens / survey.data_tokens
    rows += [("tokens in all", f"{count(survey.data_tokens)}, {shared:.0%} of them shared")]
    percentiles = "  ".join(f"{name:>6}" for name in ("least", "median", "90 %", "99 %", "most"))
    width = max(len(label) for label, _ in rows)
    place = next(place for place, (label, _) in enumerate(rows) if label.startswith("tokens of"))
    print_table(
        f"{survey.pair_set}: {survey.data_format} format",
        [*rows[:place], (" " * width, percentiles), *rows[place:]],
    )


def _print_report(report: PrecomputeReport) -> None:
    names = ", ".join(report.pair_sets)
    rows = [("rows read", count(report.rows_read)), ("pairs kept", count(report.pairs_kept))]
    rows += [("rows dropped", count(sum(report.dropped.values())))]
    rows += [
        (f"  {reason}", count(number))
        for reason, number in sorted(report.dropped.items(), key=lambda entry: -entry[1])
    ]
    rows += [("rows truncated", count(report.rows_truncated))]
    if report.rows_moved_boundary:
        rows += [
            (
                "rows whose answer starts earlier",
                f"{count(report.rows_moved_boundary)} (the prompt's last token merges with the answer's "
                "first)",
            )
        ]
    rows += [
        ("completions", count(report.completions)),
        ("  distinct", count(report.distinct_completions)),
        ("  already cached", count(report.already_cached)),
        ("  scored now", count(report.scored_now)),
        ("tokens in the data", count(report.data_tokens)),
        ("tokens run", f"{count(report.model_tokens)}{_share(report)}"),
        ("time", f"{format_seconds(report.elapsed_s)} ({report.pairs_per_s:.1f} pairs/s)"),
        ("peak memory", format_bytes(report.peak_bytes)),
        ("written", format_bytes(report.bytes_written)),
    ]
    what = (
        "everything was cached, no model was loaded"
        if report.attention is None
        else f"attention: {report.attention}"
    )
    print_table(f"{names}: reference {report.reference[:12]}, {what}", rows)
    print(f"The pairs are in {report.cache}. Next:")
    for name in report.pair_sets:
        model = ["--model", report.start_from] if report.start_from else []
        print(
            f"  {command_line('train', '--cache', report.cache, '--pairs', name, '--output', 'RUN', *model)}"
        )


def _share(report: PrecomputeReport) -> str:
    if not report.model_tokens or report.already_cached:
        return ""
    return (
        f" ({report.data_tokens / report.model_tokens:.1f} times fewer, by sharing prefixes)"
        if report.model_tokens < report.data_tokens
        else ""
    )
