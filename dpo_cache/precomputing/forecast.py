"""The predicted time, memory and disk of a precompute, for the end of a dry run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpo_cache import data
from dpo_cache.errors import first_line
from dpo_cache.lm.model.tensor_names import FAILURES
from dpo_cache.lm.streaming import Readings, Streaming
from dpo_cache.log import Log
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.planning.disk import BYTES_PER_TOKEN
from dpo_cache.planning.forecast import Forecast
from dpo_cache.planning.scoring_forecast import (
    Work,
    free_device_bytes,
    scoring_bytes,
    scoring_method,
    scoring_seconds,
)
from dpo_cache.precomputing.nominal_speed import nominal_tokens_per_s
from dpo_cache.precomputing.reference import Reference, Target
from dpo_cache.precomputing.report import PrecomputeReport
from dpo_cache.precomputing.windows import SplitPlan, Totals
from dpo_cache.types import Completion, Pair

SAMPLED_TOKENS = 2**15  # tokens of sampled pairs: more than the largest chunk


def forecast(
    options: PrecomputeOptions,
    target: Target,
    splits: Sequence[SplitPlan],
    totals: Totals,
    truncation: data.Truncation,
    report: PrecomputeReport,
    streaming: Streaming | None,
    readings: Readings | None,
    log: Log,
) -> Forecast:
    """The predicted time, memory and disk of a run that a dry run has planned."""
    reference = target.reference
    elsewhere = reference.device.type == "cuda" and not torch.cuda.is_available()
    found = Forecast(
        seconds=0.0,
        device=reference.device.type,
        device_bytes=0,
        free_device_bytes=free_device_bytes(reference.device),
        disk_bytes=BYTES_PER_TOKEN * report.data_tokens,
        free_disk_bytes=target.cache.folder.free_bytes(),
        num_workers=options.num_workers or options.min_workers or 1,
    )
    if not totals.missing_tokens:
        return found
    method = scoring_method(reference.dtype, options.quantize)
    work = _work(splits, totals, truncation)
    found.seconds = found.device_bytes = None
    try:
        found.device_bytes = scoring_bytes(
            reference.config,
            method,
            work,
            reference.device.type,
            budget_tokens=number_or_auto("budget_tokens", options.budget_tokens),
            is_streamed=streaming is not None or options.stream_weights == "on",
            free=found.free_device_bytes,
        )
        if options.ray is not None or elsewhere:
            found.seconds, found.source = _nominal_seconds(options, reference, totals, found.num_workers)
        else:
            device, workers = reference.device, found.num_workers
            found.seconds = scoring_seconds(reference.config, method, work, device, num_workers=workers)
            found.source = f"at the speed of matrix products on this machine's {device.type}"
    except FAILURES as error:
        log(
            f"{options.model}: its memory and time cannot be predicted ({first_line(error)}): its code does "
            "not run on tensors without values."
        )
    if readings is not None and found.seconds is not None:
        found.seconds = max(found.seconds, readings.elapsed_s / found.num_workers)
    return found


def _nominal_seconds(
    options: PrecomputeOptions, reference: Reference, totals: Totals, num_workers: int
) -> tuple[float, str]:
    kind, cores = reference.device.type, options.cpus_per_worker or 1
    speed = nominal_tokens_per_s(options.model, options.revision, kind, cores)
    return totals.missing_tokens / (speed * num_workers), f"at a speed that is usual for a {kind} device"


def _work(splits: Sequence[SplitPlan], totals: Totals, truncation: data.Truncation) -> Work:
    """The missing completions: their numbers of tokens, and some pairs of the first window."""
    pairs = sum(split.survey.pairs_kept for split in splits)
    prompts, answers = (
        sum(split.survey.tokens_of(name) for split in splits) for name in ("prompt", "answer")
    )
    missing = totals.distinct_completions - totals.already_cached
    longest = [window.longest for split in splits for window in split.windows if window.longest]
    sample: list[Completion] = [entry[1] for entry in sorted(longest, key=lambda entry: -len(entry[1]))[:1]]
    num_tokens = 0
    for outcome in data.make_pairs(splits[0].windows[0].rows, truncation):
        if isinstance(outcome.pair, Pair):
            sample += [outcome.pair.chosen, outcome.pair.rejected]
            num_tokens += len(outcome.pair.chosen) + len(outcome.pair.rejected)
        if num_tokens > SAMPLED_TOKENS:
            break
    return Work(
        num_tokens=totals.missing_tokens,
        num_targets=round(answers / (2 * pairs) * missing),
        mean_context=(prompts + answers) / (2 * pairs) / 2,
        sample=sample,
    )
