"""A connection to Ray (a cluster on this machine for one run, or a running one), and the workers that fit it.

Ray is optional, so it is imported only inside these functions.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType

from dpo_cache.errors import OptionError, first_line
from dpo_cache.log import Log
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.packages import check_ray_version, ray_advice

LOCAL = "local"
# Read when Ray is imported. All who can connect to a cluster can run code there, so ours listens on loopback
ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # Ray's future default; without it, Ray warns
LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

CONNECT_S = 10.0  # seconds to wait for the head of a cluster


@dataclass(frozen=True)
class Pool:
    """The workers of a run; `max_workers` None: as many as the cluster can grow to."""

    min_workers: int
    max_workers: int | None
    gpus: float  # GPUs of each worker
    cpus: float

    @property
    def most_workers(self) -> int:
        """The number of workers for which units are cut."""
        return self.max_workers or self.min_workers

    def at_most(self, num_units: int) -> Pool:
        """The pool without workers that would get no unit."""
        most = num_units if self.max_workers is None else min(self.max_workers, num_units)
        return replace(self, min_workers=min(self.min_workers, num_units), max_workers=most)

    def describe(self, num_workers: int | None = None) -> str:
        """`2 workers with 1 CPU each`, of the pool or of a number of workers."""
        most = self.max_workers
        number = str(self.min_workers if num_workers is None else num_workers)
        if num_workers is None and most != self.min_workers:
            number = f"at least {number}" if most is None else f"{number} to {most}"
        gpus = f"{self.gpus:g} GPU{'s' if self.gpus > 1 else ''} and " if self.gpus else ""
        cpus = f"{self.cpus:g} CPU{'s' if self.cpus > 1 else ''}"
        return f"{number} worker{'' if number.split()[-1] == '1' else 's'} with {gpus}{cpus} each"


def import_ray() -> ModuleType:
    """The module `ray`. Raises `OptionError` where it is missing or of a version that is not supported."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise OptionError(
            f"`ray`: Ray Data cannot be imported ({first_line(error)}).\n{ray_advice()}"
        ) from error
    check_ray_version(ray.__version__)
    return ray


@contextmanager
def connected(address: str, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """While open, this process is connected to Ray; a connection that exists is used, and kept.

    `local` starts a cluster on this machine, with so many logical CPUs and GPUs (None: those that it has),
    and ends it; `auto` finds a running one; any other value is the address of its head, HOST:PORT. Raises
    `OptionError`.
    """
    if "://" in address:
        raise OptionError(
            f"`ray` {address}: Ray Data does not run through a Ray client.\nStart dpo-cache on a node of the "
            "cluster with `ray` auto, or submit it with `ray job submit`."
        )
    if address != LOCAL:
        _check_reachable(address)
    if "ray" not in sys.modules:
        for name, value in {**ENVIRONMENT, **(LOCAL_ENVIRONMENT if address == LOCAL else {})}.items():
            os.environ.setdefault(name, value)
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    resources = {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False}
    with _own_signals():
        try:
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(resources if address == LOCAL else {}),
            )
        except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
            raise OptionError(f"`ray` {address}: {_why_not(address, error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise `OptionError` if nothing answers at HOST:PORT: Ray would try for minutes."""
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal():
        return  # Ray raises an error at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise OptionError(f"`ray` {address}: {_why_not(address, error)}") from error


def _why_not(address: str, error: Exception) -> str:
    if address == LOCAL:
        return f"Ray does not start on this machine ({first_line(error)})."
    return (
        f"no connection to a Ray cluster ({first_line(error)}).\nStart one with `ray start --head`, give the "
        "address of its head as HOST:PORT, or use `ray` local, which starts one on this machine."
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, which `ray.init` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def plan_pool(options: PrecomputeOptions, nodes: Sequence[dict[str, float]], *, needs_gpu: bool) -> Pool:
    """The pool of a run on nodes with these resources (`CPU`, `GPU`), each worker on one node.

    By default a worker has one GPU and one CPU or, where no GPU is used, all CPUs of the smallest node,
    shared by the workers of a node; and there are as many workers as fit now.
    """
    gpus = options.gpus_per_worker if options.gpus_per_worker is not None else float(needs_gpu)
    cpus = options.cpus_per_worker or _cpus_of_a_worker(options, nodes, gpus)
    fitting = sum(_fitting(node, gpus, cpus) for node in nodes)
    if options.num_workers is not None:
        return Pool(options.num_workers, options.num_workers, gpus, cpus)
    if options.min_workers is not None or options.max_workers is not None:
        lowest = options.min_workers or 1
        return Pool(lowest, options.max_workers, gpus, cpus)
    return Pool(max(1, fitting), max(1, fitting), gpus, cpus)


def node_resources(ray: ModuleType) -> list[dict[str, float]]:
    """The resources of each node of the cluster at present."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def check_pool(pool: Pool, nodes: Sequence[dict[str, float]], address: str, log: Log) -> None:
    """Raise `OptionError` where the smallest pool does not fit on this machine. A cluster may grow, so there
    `log` gets a remark.
    """
    fitting = sum(_fitting(node, pool.gpus, pool.cpus) for node in nodes)
    if fitting >= pool.min_workers:
        return
    found = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    problem = f"{pool.describe(pool.min_workers)} do not fit"
    if address == LOCAL:
        raise OptionError(
            f"`ray` {address}: {problem} on this machine, which has {found}: {fitting} do.\n"
            "Give a smaller `num_workers`, `cpus_per_worker` or `gpus_per_worker`."
        )
    log(f"{problem} on the cluster, {fitting} do; the others start when it grows. Its nodes have {found}.")


def _cpus_of_a_worker(options: PrecomputeOptions, nodes: Sequence[dict[str, float]], gpus: float) -> float:
    if gpus:
        return 1.0
    smallest = min((node["CPU"] for node in nodes if node.get("CPU", 0) >= 1), default=1.0)
    num_workers = options.num_workers or options.max_workers or options.min_workers or 1
    return float(max(1, int(smallest) // math.ceil(num_workers / max(1, len(nodes)))))


def _fitting(node: dict[str, float], gpus: float, cpus: float) -> int:
    by_gpus = node.get("GPU", 0.0) / gpus if gpus else math.inf
    by_cpus = node.get("CPU", 0.0) / cpus if cpus else math.inf
    return int(min(by_gpus, by_cpus))
