"""A unit of completions that are token ids already, scored into a cache: no data set, and no pair set."""

from __future__ import annotations

import os

from dpo_cache.errors import ModelError
from dpo_cache.log import Log, log_remark
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.precomputing.inputs import Inputs, read_config
from dpo_cache.precomputing.reference import Reference, identify_reference
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers.driver import error_of
from dpo_cache.precomputing.workers.job import Job
from dpo_cache.precomputing.workers.worker import Worker
from dpo_cache.store import Cache
from dpo_cache.store.upkeep.run_record import RunRecord


def score_completions(
    cache: Cache,
    model: str,
    unit: Unit,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    expected: str | None = None,
    trust_remote_code: bool = False,
    log: Log = log_remark,
) -> str:
    """Score the unit with a reference model, audit and publish its scores; returns the reference's id.

    The model is loaded for this and released. Raises `DpoCacheError`, and `ModelError` where the model is not
    the `expected` reference.
    """
    location = os.path.abspath(model) if os.path.isdir(model) else model
    options = PrecomputeOptions(
        model=location,
        dataset="-",
        cache=str(cache),
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        max_length=max(map(len, unit.completions)),
    )
    inputs = Inputs(options)
    reference = identify_reference(inputs, read_config(inputs), location, log)
    if expected is not None and reference.id != expected:
        raise ModelError(
            f"{model} is reference {reference.id[:12]} now, and {cache} has scores of {expected[:12]}.\n"
            "Give another `cache`, or the model that scored this one."
        )
    with RunRecord(cache, reference.id) as record:
        worker = Worker(_job(options, reference, unit, record))
        try:
            failure = worker.score(0, unit).failure
        finally:
            worker.close()
        if failure:
            raise error_of(failure, record)
    return reference.id


def _job(options: PrecomputeOptions, reference: Reference, unit: Unit, record: RunRecord) -> Job:
    place, longest = max(enumerate(unit.completions), key=lambda entry: len(entry[1]))
    return Job(
        options,
        reference.id,
        reference.identity,
        reference.provenance,
        longest_tokens=len(longest),
        run_tokens=unit.planned_tokens,
        longest=[(unit.keys[place], longest, unit.rows[place])],
        run=record.for_workers(),
    )
