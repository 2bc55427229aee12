"""`dpo-cache precompute`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dpo_cache.cli.following import following_lines
from dpo_cache.cli.output import (
    SAME_COMMAND,
    ProgressLine,
    count,
    forecast_rows,
    format_bytes,
    format_seconds,
    is_verbose,
    kept_rows,
    print_json,
    print_table,
    print_text,
    show_scoring,
    when_stopped,
)
from dpo_cache.cli.parameters import command
from dpo_cache.cli.shown_rows import print_rows
from dpo_cache.log import phase
from dpo_cache.options.precompute import PrecomputeOptions

if TYPE_CHECKING:
    from dpo_cache.data.survey import Finding, Survey
    from dpo_cache.precomputing.run import PrecomputeReport

# Rows of the report that only --verbose shows: these, and these values
DETAILS = {"rows read", "  audited", "tokens in the data", "written"}
USUAL = {("rows dropped", "0"), ("rows truncated", "0")}


@command(PrecomputeOptions)
def precompute_command(options: PrecomputeOptions, as_json: bool) -> None:
    """Run the frozen reference once over preference data and store its log-probs.

    Completions that the cache has are not scored again. Interrupted runs resume: give the same command
    again.
    """
    from dpo_cache.planning.start import check_precompute

    check_precompute(options)
    when_stopped("nothing was stored yet. Next: the same command.")
    with ProgressLine("scoring") as line:
        with phase("importing libraries"):
            from dpo_cache.precomputing.run import precompute

        def show_progress(progress: Any) -> None:
            show_scoring(line, progress)
            if progress.num_completions:
                when_stopped(f"all scores so far are stored. {SAME_COMMAND}")

        def show_survey(survey: Survey) -> None:
            if not as_json:
                line.pause(lambda: _print_survey(survey))

        def show_rows(survey: Survey) -> None:
            if not as_json:
                line.pause(lambda: print_rows(survey.pair_set, survey.shown))

        report = precompute(
            **asdict(options),
            on_show=show_rows,
            on_survey=show_survey,
            on_progress=show_progress,
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
    if report.weights_from:
        rows.append(("weights would be read", _readings(report)))
    rows += forecast_rows(report.forecast)
    print_table(f"{', '.join(report.pair_sets)}: reference {report.reference[:12]}, a dry run", rows)
    print_text("Nothing was scored or written. Next: the same command without --dry-run.")


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
    rows += [("", "  ".join(f"{name:>6}" for name in ("least", "median", "90 %", "99 %", "most")))]
    rows += [
        (f"tokens of {name}", "  ".join(f"{length:>6,}" for length in lengths))
        for name, lengths in survey.lengths().items()
    ]
    shared = 1 - survey.forest_tokens / survey.data_tokens
    rows += [("tokens in all", f"{count(survey.data_tokens)}, {shared:.0%} of them shared")]
    print_table(f"{survey.pair_set}: {survey.data_format} format", rows)


def _print_report(report: PrecomputeReport) -> None:
    rows = _results(report)
    if not is_verbose():
        usual = USUAL | {("  distinct", count(report.completions))}
        rows = [(name, value) for name, value in rows if name not in DETAILS and (name, value) not in usual]
    is_cached = report.attention is None
    how = "everything was cached, no model was loaded" if is_cached else f"attention: {report.attention}"
    print_table(f"{', '.join(report.pair_sets)}: reference {report.reference[:12]}, {how}", rows)
    print_text(f"The pairs are in {report.cache}. Next:")
    model = ["--model", report.start_from] if report.start_from else []
    for line in following_lines(report.cache, report.pair_sets, *model):
        print_text(f"  {line}")


def _results(report: PrecomputeReport) -> list[tuple[str, str]]:
    rows = [*kept_rows(report), ("rows truncated", count(report.rows_truncated))]
    if moved := report.rows_moved_boundary:
        why = "the prompt's last token merges with the answer's first"
        rows.append(("rows whose answer starts earlier", f"{count(moved)} ({why})"))
    rows += [
        ("completions", count(report.completions)),
        ("  distinct", count(report.distinct_completions)),
        ("  already cached", count(report.already_cached)),
        ("  scored now", count(report.scored_now)),
        *([("  scored by other runs", count(others))] if (others := report.scored_elsewhere) else []),
        ("  audited", _audited(report)),
        ("tokens in the data", count(report.data_tokens)),
        ("tokens run", f"{count(report.model_tokens)}{_share(report)}"),
        ("time", f"{format_seconds(report.elapsed_s)} ({report.pairs_per_s:.1f} pairs/s)"),
        ("peak memory", format_bytes(report.peak_bytes)),
        ("written", format_bytes(report.bytes_written)),
    ]
    if report.num_workers:
        rows.append(("workers", count(report.num_workers)))
    if report.weights_from:
        rows.append(("weights read", _readings(report)))
    return rows


def _readings(report: PrecomputeReport) -> str:
    return (
        f"{count(report.weight_readings)} times from {report.weights_from}, "
        f"{format_bytes(report.weight_bytes_read)} ({format_seconds(report.weight_read_s)} by itself)"
    )


def _audited(report: PrecomputeReport) -> str:
    if report.audit_largest_gap is None:
        return "0"
    return f"{count(report.audited)} (largest gap {report.audit_largest_gap:.1e} nats a token)"


def _share(report: PrecomputeReport) -> str:
    if report.already_cached or not 0 < report.model_tokens < report.data_tokens:
        return ""
    return f" ({report.data_tokens / report.model_tokens:.1f} times fewer, by sharing prefixes)"
