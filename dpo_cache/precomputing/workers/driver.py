"""The driver of workers: it hands out units, counts receipts, and raises one error for the first failure.

units -> `local.score_units` or `ray.score_units` -> receipts -> report, progress, index of scores
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import chain

import torch

from dpo_cache import errors
from dpo_cache.errors import DpoCacheError, OptionError, StorageError
from dpo_cache.lm.device import choose_device
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.packages import check_ray
from dpo_cache.precomputing.audit import AuditTotals, withdraw
from dpo_cache.precomputing.inputs import Inputs
from dpo_cache.precomputing.planned import PlannedRun
from dpo_cache.precomputing.report import describe_progress
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers.environments import worker_environments
from dpo_cache.precomputing.workers.job import Failure, Job, Receipt
from dpo_cache.store.upkeep.run_record import RunRecord

RENEW_EVERY_S = 60.0  # seconds between calls of `RunRecord.renew`
READS_EACH_TIME = (
    "the weights do not fit the workers' devices, so they are read for each unit. With `stream_weights` on, "
    "each worker gets one unit."
)


def score_by_workers(run: PlannedRun, record: RunRecord) -> AuditTotals | None:
    """Score all splits, then publish them. Returns the totals of the audit; None without one.

    Workers are started only if something is to be scored. Raises one `DpoCacheError` for the first failure,
    after they have ended.
    """
    tally = Tally(run)
    if run.plan or run.totals.missing_tokens:
        _score(run, tally, record)
    if tally.audited and tally.audited.completions:
        record.end_audit()
    if tally.readings:
        speed = run.readings.bytes_per_s if run.readings else math.inf
        run.report.add_readings(tally.readings, speed)
    for split in run.splits:
        run.publish(split, tally.audited, record)
    return tally.audited


def workers_device(options: PrecomputeOptions) -> torch.device | None:
    """The device of workers on Ray, which this machine may lack; None without Ray.

    The dtype of the forward pass, and with it the reference, depends on it.
    """
    if options.ray is None:
        return None
    if options.device != "auto":
        return torch.device(options.device)
    if options.gpus_per_worker is not None:
        return torch.device("cuda" if options.gpus_per_worker else "cpu")
    from dpo_cache.precomputing.workers.ray_cluster import connected, import_ray, node_resources

    if options.ray == "local":
        return choose_device()
    with connected(options.ray):
        has_gpus = any(node.get("GPU", 0) for node in node_resources(import_ray()))
    if not has_gpus and (options.min_workers or options.max_workers):
        raise OptionError(
            "`ray`: no node has a GPU now, and nodes that the cluster adds may have some; the dtype of the "
            "forward pass depends on it.\nGive `gpus_per_worker` 1, or `device` cpu."
        )
    return torch.device("cuda" if has_gpus else "cpu")


def check_for_workers(inputs: Inputs, cache: str) -> None:
    """Raise `OptionError` for a model or a cache that other processes cannot have, for more workers than
    devices, and where Ray is not installed.
    """
    if inputs.model is not None:
        raise OptionError(
            "workers load the model themselves, and this one is loaded already.\n"
            "Give its path or Hub id, or leave `num_workers` and `ray` out."
        )
    if cache.startswith("memory://"):
        raise OptionError(
            f"`cache` {cache}: is in the memory of this process, which workers do not share.\n"
            "Give a folder, or another URL of fsspec."
        )
    if inputs.options.ray is not None:
        check_ray()
    elif inputs.options.num_workers is not None:
        if os.name == "nt":
            raise OptionError(
                "`num_workers`: several processes score only on Linux and macOS.\n"
                "Leave it out, or run it in WSL."
            )
        worker_environments(choose_device(inputs.options.device).type, inputs.options.num_workers)


def describe_job(run: PlannedRun, record: RunRecord) -> Job:
    """The run as a job for its workers. The run's record is written first, because they read it."""
    options, reference, cache = run.options, run.target.reference, str(run.target.cache)
    is_folder = os.path.isdir(options.model)
    longest_tokens, run_tokens = run.extent()
    return Job(
        replace(
            options,
            model=os.path.abspath(options.model) if is_folder else options.model,
            revision=None if is_folder else reference.provenance["revision"],
            cache=cache if "://" in cache else os.path.abspath(cache),
            dtype=reference.identity["dtype"],
            device=reference.device.type,
        ),
        reference.id,
        reference.identity,
        reference.provenance,
        longest_tokens,
        run_tokens,
        run.longest,
        record.for_workers(),
    )


def _score(run: PlannedRun, tally: Tally, record: RunRecord) -> None:
    run.check_writable()
    failed = None
    receipts = _start(describe_job(run, record), run, tally)
    # receipts are a generator: its end is the end of all workers
    with _renewed(record), closing(receipts):  # type: ignore[type-var]
        for receipt in receipts:
            if tally.add(receipt) and receipt.failure:
                failed = receipt
                break
    if failed and failed.failure:
        raise error_of(failed.failure, record, _worker_of(failed))


@contextmanager
def _renewed(record: RunRecord) -> Iterator[None]:
    """While open, the record is rewritten now and then: receipts may be hours apart."""
    ended = threading.Event()

    def keep_renewing() -> None:
        while not ended.wait(RENEW_EVERY_S):
            with suppress(StorageError):  # the next attempt may succeed
                record.renew()

    thread = threading.Thread(target=keep_renewing, name="run record", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _start(job: Job, run: PlannedRun, tally: Tally) -> Iterator[Receipt]:
    """The receipts of all units, in any order; no worker is left when they are exhausted or closed."""

    def make_units(num_workers: int) -> Iterator[tuple[int, Unit]]:
        if run.size:
            run.size.num_workers = num_workers
        return enumerate(tally.handed_out(chain.from_iterable(map(run.draw, run.splits))))

    if run.options.ray is None:
        from dpo_cache.precomputing.workers import local

        return local.score_units(job, make_units, log=run.log)
    from dpo_cache.precomputing.workers import ray

    return ray.score_units(job, make_units, log=run.log)


def error_of(failure: Failure, record: RunRecord, where: str = "") -> DpoCacheError:
    """The error to raise for a failure. If scores were wrong, all files that the run published are
    withdrawn.
    """
    message = failure.message
    if failure.withdraws:
        message += f"\n{withdraw(record)} {failure.advice}"
    return getattr(errors, failure.kind, DpoCacheError)(message + where)


def _worker_of(receipt: Receipt) -> str:
    log_file = f" Its log: {receipt.log_file}" if receipt.log_file else ""
    return f"\n(In worker {receipt.worker}.{log_file})"


class Tally:
    """Counts receipts in the report, and reports the progress of the run."""

    def __init__(self, run: PlannedRun, clock: Callable[[], float] = time.perf_counter):
        self._run, self._clock = run, clock
        # tokens and pair set of the units without a receipt; the units themselves would take too much memory
        self._handed_out: dict[int, tuple[int, str]] = {}
        self._planned_tokens = 0  # tokens of the units with a receipt
        self._started: float | None = None  # time at which the first worker began to score
        self._audited: dict[str, AuditTotals] = {}  # by worker
        self._readings: dict[str, tuple[str, int, int]] = {}
        self._remarks: set[str] = set()

    def handed_out(self, units: Iterator[Unit]) -> Iterator[Unit]:
        """The units, noted as they go to the workers; their numbers count up from 0."""
        for number, unit in enumerate(units):
            self._handed_out[number] = unit.planned_tokens, unit.pair_set
            yield unit

    @property
    def audited(self) -> AuditTotals | None:
        """The totals of the audits of all workers; None if no worker has reported one."""
        together: AuditTotals | None = None
        for one in self._audited.values():
            together = one if together is None else together.plus(one)
        return together

    @property
    def readings(self) -> tuple[str, int, int] | None:
        """The readings of streamed weights by all workers: place, count and bytes."""
        found = [*self._readings.values()]
        return (found[0][0], sum(one[1] for one in found), sum(one[2] for one in found)) if found else None

    def add(self, receipt: Receipt) -> bool:
        """Count a receipt, once for each unit; returns whether it is the unit's first one."""
        unit = self._handed_out.pop(receipt.number, None)
        if unit is None:
            return False
        report = self._run.report
        for name, keys in receipt.shards.items():
            self._run.target.scores.add_published(name, keys)
        report.scored_now += receipt.num_completions
        report.model_tokens += receipt.num_tokens
        report.bytes_written += receipt.bytes_written
        report.attention = receipt.attention or report.attention
        report.budget_tokens = receipt.budget_tokens or report.budget_tokens
        report.loaded_bytes = max(report.loaded_bytes, receipt.loaded_bytes)
        report.peak_bytes = max(report.peak_bytes, receipt.peak_bytes)
        if receipt.audited is not None:
            self._audited[receipt.worker] = receipt.audited
        if receipt.readings is not None:
            self._readings[receipt.worker] = receipt.readings
        remarks = receipt.remarks
        if receipt.readings is not None and self._run.streaming is None:
            remarks += (READS_EACH_TIME,)
        for text in remarks:
            if text not in self._remarks:  # workers mostly make the same remarks
                self._remarks.add(text)
                self._run.log(text)
        if receipt.failure is None:
            self._show(receipt, *unit)
        return True

    def _show(self, receipt: Receipt, planned_tokens: int, pair_set: str) -> None:
        run, report = self._run, self._run.report
        if run.size:
            run.size.note(planned_tokens, receipt.elapsed_s)
        now = self._clock()
        if self._started is None:
            self._started = now - receipt.elapsed_s
        report.scoring_s = max(now - self._started, receipt.elapsed_s)
        report.num_workers = max(report.num_workers, receipt.num_workers)
        self._planned_tokens += planned_tokens
        run.on_progress(
            describe_progress(
                report,
                run.totals,
                run.units,
                pair_set,
                planned_tokens=self._planned_tokens,
                run_tokens=report.model_tokens,
                num_workers=receipt.num_workers,
            )
        )
