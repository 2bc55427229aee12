"""Units -> receipts on a Ray cluster: a pool of Ray Data's actors scores them, each unit as one block.

A unit is one row of one Arrow block, which Ray neither splits nor joins. An exception of an actor would reach
the driver as a long traceback without row numbers, so errors are sent as receipts. Ray runs a unit again if
its worker ended; the `_Ledger` counts the attempts, and after three of them the unit's receipt is a failure.
"""

from __future__ import annotations

import logging
import pickle
import platform
import re
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dpo_cache.errors import DpoCacheError, first_line, shown_rows
from dpo_cache.log import Log, log_remark
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers.job import Failure, Job, Receipt, rows_of
from dpo_cache.precomputing.workers.ray_cluster import (
    Pool,
    check_pool,
    connected,
    import_ray,
    node_resources,
    plan_pool,
)
from dpo_cache.precomputing.workers.worker import Worker

if TYPE_CHECKING:
    from ray.data import Dataset

ATTEMPTS = 3  # attempts to score a unit whose workers end
IN_FLIGHT = 1  # units of an actor at a time: a waiting unit could be scored by another actor
RESTARTS = 100  # restarts of an actor in a run: preemptible nodes may disappear often
NO_PROGRESS_S = 2 * 3600.0  # ends a run without receipts; starting nodes and loading takes less
STOP_S = 10.0  # seconds to wait for the end of actors
LOGS = "/tmp/ray/session_latest/logs"

Numbered = tuple[int, Unit]
MakeWorker = Callable[[Job], Worker]


def score_units(
    job: Job,
    units: Callable[[int], Iterable[Numbered]],
    *,
    log: Log = log_remark,
    make_worker: MakeWorker | None = None,
) -> Iterator[Receipt]:
    """Yield a receipt for each unit, in any order. Once it is exhausted or closed, no worker is at work.

    `units` makes the numbered units for a number of workers; all of them are made before the first one is
    scored. `make_worker` (default: `Worker`) is called once in each actor. Raises `OptionError` where Ray or
    room for the workers is missing, and `DpoCacheError` where Ray ends the run.
    """
    options = job.options
    assert options.ray is not None
    with connected(options.ray):
        ray = import_ray()
        nodes = node_resources(ray)
        pool = plan_pool(options, nodes, needs_gpu=options.device == "cuda")
        check_pool(pool, nodes, options.ray, log)
        # the driver holds one unit at a time, and Ray spills blocks that do not fit into its memory to disk
        blocks = [
            (unit.planned_tokens, ray.put(_pack_unit(number, unit)))
            for number, unit in units(pool.most_workers)
        ]
        if not blocks:
            return
        # largest first, so that all workers end at about the same time
        blocks.sort(key=lambda block: block[0], reverse=True)
        log(f"{pool.describe()} on Ray; each writes a log file in {LOGS} on its node.")
        ledger = _open_ledger(ray)
        try:
            with _ray_data_settings(ray):
                arguments = (job, make_worker or Worker, ledger)
                dataset = _scored(ray, [block for _, block in blocks], pool.at_most(len(blocks)), arguments)
                with closing(_receipts(dataset)) as receipts:
                    yield from receipts
        except _errors_of_ray(ray) as error:
            raise DpoCacheError(_explain(error)) from error
        finally:
            _end_workers(ray, ledger)


def _scored(ray: Any, blocks: list[Any], pool: Pool, arguments: tuple[Any, ...]) -> Dataset:
    """The data set of receipts; nothing is scored before it is read."""
    compute = ray.data.ActorPoolStrategy(
        min_size=pool.min_workers,
        max_size=pool.max_workers,
        max_tasks_in_flight_per_actor=IN_FLIGHT,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.64 deprecates these options of actors
        return ray.data.from_arrow_refs(blocks).map_batches(
            _Actor,
            batch_size=1,
            batch_format="pyarrow",
            compute=compute,
            fn_constructor_args=arguments,
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            max_restarts=RESTARTS,
            max_task_retries=ATTEMPTS,
        )


def _receipts(dataset: Dataset) -> Generator[Receipt, None, None]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for packed in batch["receipt"]:
            yield pickle.loads(packed.as_buffer())


class _Actor:
    """A worker in a pool of Ray Data: a block with one unit -> a block with its receipt."""

    def __init__(self, job: Job, make_worker: MakeWorker, ledger: Any):
        self._ray, self._ledger = import_ray(), ledger
        self._worker = make_worker(job)  # loads nothing: Ray would report an error here late and unclearly

    def __call__(self, block: pa.Table) -> pa.Table:
        number, unit = _unpack_unit(block)
        # in a list: Ray passes a handle, and does not wait for the actor
        itself = [self._ray.get_runtime_context().current_actor]
        num_begun, num_workers = self._ray.get(self._ledger.begin.remote(number, itself))
        if num_begun > ATTEMPTS:
            receipt = Receipt(number, self._worker.name, failure=_ended_workers(unit))
        elif num_begun:
            receipt = self._worker.score(number, unit)
        else:
            receipt = Receipt(number, self._worker.name)  # the run has ended; nobody reads it
        self._ledger.end.remote(number)
        return _pack_receipt(replace(receipt, num_workers=num_workers, log_file=_log_file()))


class _Ledger:
    """Counts the attempts for each unit, and keeps track of the actors at work. It is an actor itself.

    It holds no handle of an idle actor, because a handle would keep the actor alive.
    """

    def __init__(self) -> None:
        self._num_begun: Counter[int] = Counter()
        self._at_work: dict[int, Any] = {}  # number of a unit -> handle of its actor
        self._has_stopped = False

    def begin(self, number: int, actor: list[Any]) -> tuple[int, int]:
        """The number of attempts for the unit, 0 once the run has ended, and the number of actors at work."""
        if self._has_stopped:
            return 0, 0
        self._num_begun[number] += 1
        self._at_work[number] = actor[0]
        return self._num_begun[number], len(self._at_work)

    def end(self, number: int) -> None:
        """Record that the unit has a receipt."""
        self._at_work.pop(number, None)

    def stop(self) -> list[Any]:
        """Let no unit start from now on. Returns the actors at work."""
        self._has_stopped = True
        return [*self._at_work.values()]


def _open_ledger(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(_Ledger)
    return kind.remote()


def _end_workers(ray: Any, ledger: Any) -> None:
    """End the actors at work, and wait for their end. An actor that has no unit publishes nothing."""
    with suppress(ray.exceptions.RayError):
        actors = ray.get(ledger.stop.remote(), timeout=STOP_S)
        for actor in actors:
            ray.kill(actor)
        for actor in actors:
            with suppress(ray.exceptions.RayError):  # raised once the actor has ended
                ray.get(actor.__ray_ready__.remote(), timeout=STOP_S)
        ray.kill(ledger)


@contextmanager
def _ray_data_settings(ray: Any) -> Iterator[None]:
    """While open, Ray Data writes nothing to the terminal, and adds an actor when all are at work."""
    context = ray.data.DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_errored_blocks": 0,
        "execution_no_progress_timeout_s": NO_PROGRESS_S,
        "autoscaling_config": replace(context.autoscaling_config, actor_pool_util_upscaling_threshold=1.0),
    }
    before = {name: getattr(context, name) for name in settings if hasattr(context, name)}
    handlers = logging.getLogger("ray.data").handlers
    consoles = [(one, one.level) for one in handlers if isinstance(one, logging.StreamHandler)]
    try:
        for name in before:
            setattr(context, name, settings[name])
        for handler, _ in consoles:
            handler.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for handler, level in consoles:
            handler.setLevel(level)


def _errors_of_ray(ray: Any) -> tuple[type[Exception], ...]:
    own = [getattr(ray.data.exceptions, name, None) for name in ("ExecutionTimeoutError", "SystemException")]
    return (ray.exceptions.RayError, *(kind for kind in own if kind is not None))


def _explain(error: Exception) -> str:
    """One line of Ray's error: the exception at its end, if its lines are a traceback."""
    raised = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception): .*)$", str(error), re.MULTILINE)
    return (
        f"Ray ended the run: {raised[-1] if raised else first_line(error)}\n"
        f"Its logs are in {LOGS} on each node, with a file for each worker. Each node needs the dpo-cache, "
        "Python and Ray of this machine. What was scored before is kept: run again to score the rest."
    )


def _ended_workers(unit: Unit) -> Failure:
    rows = rows_of(unit)
    message = (
        f"rows {shown_rows(rows)} of {unit.pair_set}: {ATTEMPTS} workers that were to score them ended.\n"
        "The system kills processes when memory runs out: give fewer workers on a machine, or a smaller "
        f"`budget_tokens`. The worker's log on {platform.node()} is {_log_file()}."
    )
    return Failure("DpoCacheError", message, rows)


def _log_file() -> str:
    """The file that receives this process's stderr; empty if the system does not show it."""
    path = Path("/proc/self/fd/2").resolve()
    return str(path) if path.is_file() else ""


def _pack_unit(number: int, unit: Unit) -> pa.Table:
    return pa.table({"number": [number], "unit": pa.array([pickle.dumps(unit)], pa.large_binary())})


def _unpack_unit(block: pa.Table) -> tuple[int, Unit]:
    return block["number"][0].as_py(), pickle.loads(block["unit"][0].as_buffer())


def _pack_receipt(receipt: Receipt) -> pa.Table:
    return pa.table({"receipt": pa.array([pickle.dumps(receipt)], pa.large_binary())})
