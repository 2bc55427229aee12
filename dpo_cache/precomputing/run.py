"""data -> lm -> store: score the reference's log-probs of a data set, once.

read rows -> tokenize -> plan what is missing -> cut units -> score -> publish scores -> publish pairs
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, IterableDataset

from dpo_cache import data
from dpo_cache.errors import OptionError
from dpo_cache.files.locations import is_absolute
from dpo_cache.lm.device import choose_device, peak_bytes
from dpo_cache.lm.model.unchanged import one_checkpoint
from dpo_cache.log import Log, keeps_remarks, log_remark, phase
from dpo_cache.options.base import with_new_names
from dpo_cache.options.keywords import keywords_of
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.planning.disk import check_disk
from dpo_cache.precomputing.here import score_here
from dpo_cache.precomputing.inputs import (
    Inputs,
    read_config,
    read_splits,
    read_tokenizer,
    take_inputs,
    tokenize_split,
)
from dpo_cache.precomputing.pair_sets import absolute, check_names, describe_tokenization
from dpo_cache.precomputing.planned import PlannedRun
from dpo_cache.precomputing.reference import (
    Target,
    choose_reference_streaming,
    identify_reference,
    open_target,
    plan_readings,
)
from dpo_cache.precomputing.report import OnProgress, PrecomputeReport
from dpo_cache.precomputing.template_days import choose_template_dates, record_day
from dpo_cache.precomputing.windows import Entry, Planner, SplitPlan, Window
from dpo_cache.precomputing.workers.driver import check_for_workers, score_by_workers, workers_device
from dpo_cache.progress import bars_hidden, show_scoring, shows_progress
from dpo_cache.store import open_cache
from dpo_cache.store.cache import check_name
from dpo_cache.store.upkeep.run_record import RunRecord, end_killed_runs

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnSurvey = Callable[[data.Survey], None]


@keywords_of(PrecomputeOptions)
@shows_progress("scoring", show_scoring)
@keeps_remarks
@bars_hidden("datasets")
@one_checkpoint()
def precompute(
    model: str | os.PathLike[str] | PreTrainedModel,
    dataset: str
    | os.PathLike[str]
    | Dataset
    | DatasetDict
    | IterableDataset
    | Sequence[dict[str, Any]]
    | pd.DataFrame
    | pl.DataFrame,
    cache: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    on_show: OnSurvey | None = None,
    on_survey: OnSurvey | None = None,
    on_progress: OnProgress | None = None,
    log: Log | None = None,
    **options: Any,
) -> PrecomputeReport:
    """Score the data set's completions that the cache lacks and publish its pair sets.

    Only completions that no earlier run scored under the same reference are run through the model, and the
    model is loaded only if there are any. Scores are published at least every 20 seconds. Interrupted runs
    resume: make the same call again. The global random state is not changed.

    `dataset` may be rows that are loaded already; then `name=` is needed, and the split is train, or the
    splits are those of a `DatasetDict`. `model` may be a loaded model; then `tokenizer` is needed, too. If
    its weights and config equal those of the checkpoint it was loaded from, it is the same reference as that
    checkpoint; otherwise it is a separate reference, and a remark reports it. It is scored in eval mode,
    and has its former mode afterwards.

    With `num_workers`, other processes score, each on its own device; with `ray`, actors on a Ray cluster do.
    Two runs over the same data at the same time share the work: each draws its units in random order, and
    leaves out what others have published.

    With `dry_run` the data is surveyed and nothing else happens: no model is loaded, nothing is written.

    `progress=True` shows on stderr what the command line shows. `on_survey` gets the survey of each split
    before the model is loaded (of a stream: at its end), `on_progress` is called after every chunk, and `log`
    gets each remark (default: the logger `dpo_cache`); the report lists them, too. With `show`, `on_show`
    gets each survey before anything is scored, with that many rows as text in `shown` (of a stream: rows of
    its first window). Raises `DpoCacheError`; nothing that was published before is lost.
    """
    started = time.perf_counter()
    options = with_new_names(PrecomputeOptions, options, log or log_remark)
    inputs = take_inputs(model, dataset, cache, tokenizer, options)
    with tempfile.TemporaryDirectory(prefix="dpo-cache-") as spool:  # only streams are written to it
        report = _run(
            inputs,
            Path(spool),
            on_show or (lambda _: None),
            on_survey or (lambda _: None),
            on_progress or (lambda _: None),
            log or log_remark,
        )
    report.elapsed_s = time.perf_counter() - started
    report.pairs_per_s = report.pairs_kept / report.elapsed_s
    return report


def _run(
    inputs: Inputs, spool: Path, on_show: OnSurvey, on_survey: OnSurvey, on_progress: OnProgress, log: Log
) -> PrecomputeReport:
    options = inputs.options
    name = check_name(options.name or data.dataset_name(options.dataset))
    truncation = data.Truncation(options.max_length, options.truncation, options.max_prompt_length)
    cache = open_cache(options.cache, create=True)
    if options.uses_workers:
        check_for_workers(inputs, str(cache))
    device = workers_device(options) or choose_device(options.device)
    config = read_config(inputs)
    splits = read_splits(inputs, name, log)
    tokenizer, tokenizer_location = read_tokenizer(inputs)
    reference = identify_reference(inputs, config, tokenizer_location, log, device)
    if options.stream_weights == "on" and options.ray is None:
        choose_reference_streaming(inputs, reference)  # raises an error if the weights cannot be streamed
    if not options.dry_run:
        for remark in end_killed_runs(cache, reference.id):
            log(remark)
    target = open_target(cache, reference, options.reference, log)
    planner = Planner(target.scores, truncation, config, reference.name)
    report = PrecomputeReport([split.survey.pair_set for split in splits], str(cache), reference.id)
    days = choose_template_dates(cache, report.pair_sets, tokenizer, options.template_date, log)
    for split, day in zip(splits, days, strict=True):
        split.template_date = day

    def plan(split: SplitPlan) -> Iterator[Window]:
        """Yield the split's windows, then report its survey."""
        for window in planner.plan(split, tokenize_split(split, tokenizer, options, spool, log)):
            if not is_planned:  # the window is scored before the next one is planned
                inspect(split)
                for remark in split.survey.first_remarks():
                    log(remark)
            yield window
        inspect(split)
        split.survey.check_pairs()
        report.add(split.survey)
        for remark in split.survey.remarks():
            log(remark)
        on_survey(split.survey)

    def inspect(split: SplitPlan) -> None:
        """Show some rows, once. Raise `DataError` if most answers start early."""
        survey, windows = split.survey, [window.rows for window in split.windows]
        if options.show and not survey.shown:
            survey.shown = data.show_rows(windows, survey, tokenizer, truncation, options.show)
            on_show(survey)
        if options.early_answers == "stop":
            survey.check_boundary()

    streams = options.streaming or any(isinstance(split.rows, IterableDataset) for split in splits)
    if streams and options.ray is not None:
        raise OptionError(
            "`ray` with a stream of rows: the units of a run must be known before its workers start.\n"
            "Give the rows as a Dataset or a file, or use `num_workers` on one machine."
        )
    is_planned = options.dry_run or not streams
    if is_planned:  # all rows are tokenized, checked and planned before the first score
        for split in splits:
            with phase("tokenizing"):
                list(plan(split))
        check_disk(cache, report.data_tokens)
    check_names(inputs, splits, name, target, are_planned=is_planned)
    streaming = readings = None
    if (streams or planner.totals.missing_tokens) and options.ray is None:
        streaming = choose_reference_streaming(inputs, reference)
    if streaming:
        readings = plan_readings(inputs, reference, streaming, planner.totals)
        log(f"{streaming.reason}, {readings if is_planned else 'once for each window of chunks'}.")
        if options.dry_run:
            report.plan_readings(readings)
    if options.dry_run:
        from dpo_cache.precomputing.forecast import forecast  # imports the code that runs models

        planned = (splits, planner.totals, truncation, report, streaming, readings)
        with phase("predicting time and memory"):
            report.forecast = forecast(options, target, *planned, log)
    else:
        cache.check_writable()
        for split in splits:
            record_day(cache, split.survey.pair_set, split.template_date)
        run = PlannedRun(
            inputs,
            name,
            splits,
            truncation,
            describe_tokenization(inputs, tokenizer, tokenizer_location),
            target,
            planner.totals,
            report,
            _longest(splits),
            streaming,
            readings,
            plan if streams else None,
            on_progress,
            log,
        )
        with RunRecord(cache, reference.id) as record:
            audited = (score_by_workers if options.uses_workers else score_here)(run, record)
        if audited:
            report.add_audit(audited)
        report.scored_elsewhere = run.units.completions_elsewhere
        report.start_from = _start_from(target)
    report.distinct_completions = planner.totals.distinct_completions
    report.already_cached = planner.totals.already_cached
    report.missing_tokens = planner.totals.missing_tokens
    report.peak_bytes = report.peak_bytes or peak_bytes(choose_device() if options.ray else reference.device)
    return report


def _longest(splits: Sequence[SplitPlan]) -> list[Entry]:
    """The longest completion that the cache lacks, as far as the splits are planned."""
    longest = [window.longest for split in splits for window in split.windows if window.longest]
    return sorted(longest, key=lambda entry: len(entry[1]))[-1:]


def _start_from(target: Target) -> str | None:
    """The checkpoint to train from, if the one that the reference's entry names is gone."""
    recorded = target.cache.read_reference(target.reference.id)["provenance"].get("model")
    is_gone = recorded is not None and is_absolute(recorded) and not os.path.isdir(recorded)
    return absolute(target.reference.name) if is_gone else None
