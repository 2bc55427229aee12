"""One worker of a run: it scores units and publishes their scores without the driver.

    worker = Worker(job)                  # loads nothing
    receipt = worker.score(number, unit)  # loads the model the first time; errors are receipts, too
    worker.close()

verify the checkpoint -> load -> audit a first sample -> score -> audit -> publish -> receipt

A worker only writes: it never reads which keys the cache has. Publishing is idempotent, so a unit may be
scored again by another worker.
"""

from __future__ import annotations

import contextvars
import os
import platform
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dpo_cache.errors import CacheError, DpoCacheError, ModelError, first_line, shown_rows
from dpo_cache.files.node_lock import node_lock
from dpo_cache.lm.device import peak_bytes
from dpo_cache.lm.model.unchanged import check_not_rewritten, one_checkpoint
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.log import Log
from dpo_cache.precomputing.audit import Audit, AuditError, open_audit
from dpo_cache.precomputing.inputs import Inputs, read_config
from dpo_cache.precomputing.reference import (
    Reference,
    choose_reference_streaming,
    identify_reference,
    open_reference,
)
from dpo_cache.precomputing.units import Scored, Unit, score_unit
from dpo_cache.precomputing.workers.job import Failure, Job, Receipt, rows_of
from dpo_cache.progress import remark
from dpo_cache.store import Cache, open_cache
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.keys import key_array
from dpo_cache.store.score_writer import publish_scores
from dpo_cache.store.upkeep.run_record import RunRecord

if TYPE_CHECKING:
    from dpo_cache.lm.runner import Runner  # imports the code that runs models


class Worker:
    """Scores units of a job, one at a time."""

    def __init__(self, job: Job):
        self.name = f"{os.getpid()} on {platform.node()}"
        self._job = job
        # the digests of the checkpoint's files are kept from one call to the next, whichever thread calls
        self._context = contextvars.copy_context()
        self._stack = ExitStack()
        self._loaded: _Loaded | None = None
        self._load_s = 0.0
        self._remarks: list[str] = []

    def score(self, number: int, unit: Unit) -> Receipt:
        """Score the unit and publish its scores. An error is in the receipt, with its traceback on stderr."""
        return self._context.run(self._score, number, unit)

    def close(self) -> None:
        """Release the model."""
        self._loaded = None
        self._context.run(self._stack.close)

    def _score(self, number: int, unit: Unit) -> Receipt:
        published = _Published()
        failure = None
        try:
            loaded = self._loaded = self._loaded or self._load()
            published = loaded.score(unit, self._job)
            failure = published.failure
        except Exception as error:  # only a receipt reaches the driver as one readable message
            traceback.print_exc()
            failure = describe_failure(error, unit)
        remarks, self._remarks = tuple(self._remarks), []
        load_s, self._load_s = self._load_s, 0.0
        return replace(
            self._describe(),
            number=number,
            shards=published.shards,
            num_tokens=published.num_tokens,
            elapsed_s=published.elapsed_s,
            bytes_written=published.num_bytes,
            load_s=load_s,
            remarks=remarks,
            failure=failure,
        )

    def _describe(self) -> Receipt:
        """A receipt with the state of the worker."""
        if self._loaded is None:
            return Receipt(-1, self.name)
        loaded, runner = self._loaded, self._loaded.runner
        return Receipt(
            -1,
            self.name,
            audited=replace(loaded.audit.totals) if loaded.audit else None,
            attention=runner.attention.name,
            budget_tokens=runner.budget.tokens,
            loaded_bytes=loaded.loaded_bytes,
            peak_bytes=peak_bytes(loaded.reference.device),
            readings=runner.layer_major.readings if runner.layer_major is not None else None,
        )

    def _load(self) -> _Loaded:
        started = time.perf_counter()
        job = self._job
        cache = open_cache(job.options.cache, create=True)
        _check_shared(cache, job)
        self._stack.enter_context(one_checkpoint())
        inputs = Inputs(job.options)
        reference = _identify(inputs, job, self._log)
        runner = self._stack.enter_context(
            open_reference(
                inputs,
                reference,
                self._log,
                longest=job.longest_tokens,
                run_tokens=job.run_tokens,
                streaming=choose_reference_streaming(inputs, reference),
            )
        )
        record = RunRecord(cache, job.reference_id, run=job.run)
        audit = open_audit(job.options.audit, record, self._log)
        self._load_s = time.perf_counter() - started
        return _Loaded(cache, reference, runner, record, audit, peak_bytes(reference.device))

    def _log(self, text: str) -> None:
        self._remarks.append(text)
        remark(text)


@dataclass
class _Published:
    """The shards that a worker published for a unit, and the error that ended it early."""

    shards: dict[str, np.ndarray] = field(default_factory=dict)  # see `Receipt`
    num_tokens: int = 0
    num_bytes: int = 0
    elapsed_s: float = 0.0
    failure: Failure | None = None


@dataclass(frozen=True)
class _Loaded:
    """A loaded reference, and the destination of its scores."""

    cache: Cache
    reference: Reference
    runner: Runner
    record: RunRecord
    audit: Audit | None
    loaded_bytes: int

    def score(self, unit: Unit, job: Job) -> _Published:
        """Score and publish the unit."""
        done, started = _Published(), time.perf_counter()
        provenance = {**job.provenance, "device": self.reference.provenance["device"]}

        def publish(scored: Sequence[Scored]) -> None:
            check_not_rewritten()
            if self.audit:
                self.audit.check(scored)
            self.cache.publish_reference(job.identity, provenance)
            place = f"references/{job.reference_id}/scores"
            name, num_bytes = publish_scores(self.cache.folder, place, scored, self.record.add_shard)
            done.shards[name] = key_array([key for key, _ in scored])
            done.num_bytes += num_bytes

        def on_step(step: ScoringStep, _: int) -> None:
            done.num_tokens += step.num_tokens

        try:
            if self.audit:
                self.audit.begin(unit, self.runner, job.longest)
            score_unit(unit, self.runner, publish, on_step)
        except Exception as error:
            traceback.print_exc()
            done.failure = describe_failure(error, unit)
        done.elapsed_s = time.perf_counter() - started
        return done


def describe_failure(error: Exception, unit: Unit) -> Failure:
    """The error in the form that a receipt carries."""
    rows = rows_of(unit)
    if isinstance(error, AuditError):
        return Failure("ModelError", error.problem, rows, withdraws=True, advice=error.advice)
    if isinstance(error, DpoCacheError):
        return Failure(type(error).__name__, str(error), rows)
    where = f"row{'s' if len(rows) > 1 else ''} {shown_rows(rows)} of {unit.pair_set}"
    return Failure("DpoCacheError", f"{where}: {type(error).__name__}: {first_line(error)}", rows)


def _check_shared(cache: Cache, job: Job) -> None:
    """Raise `CacheError` unless the cache is the driver's: at the same path, another machine may have another
    folder, or none.
    """
    if not cache.folder.exists(job.run["record"]):
        raise CacheError(
            f"{cache}: on {platform.node()}, this is not the cache of the run: it lacks the run's record "
            f"{job.run['record']}.\nGive a folder that all machines share, or a URL such as s3://bucket/cache."
        )


def _identify(inputs: Inputs, job: Job, log: Log) -> Reference:
    """The reference on this machine. Raises `ModelError` if it differs from the driver's.

    One worker of a machine hashes the weights while the others wait and then read its digests.
    """
    with node_lock(f"hash {job.options.model}"):
        reference = identify_reference(inputs, read_config(inputs), "", log)
    if differing := differing_fields(job.identity, reference.identity):
        raise ModelError(
            f"{job.options.model}: on {platform.node()}, this is another model than the run's reference "
            f"{job.reference_id[:12]}; they differ in\n"
            + "".join(f"  {line}\n" for line in differing)
            + "Give a folder that all machines share, a copy of the same checkpoint, or a Hub id."
        )
    return reference
