"""Several processes that train one policy together, over torch.distributed.

accelerate's process state reads the launcher's variables (accelerate launch, torchrun, mpirun; SLURM's
variables are translated for it), starts the process group and chooses each rank's device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from torch import distributed

from dpo_cache.errors import OptionError, OtherRankError, TrainingError, first_line
from dpo_cache.files.machine import num_cores
from dpo_cache.training.launch import RENDEZVOUS, LaunchedRank, launched_rank
from dpo_cache.training.ranks import Ranks
from dpo_cache.training.watch import Watch

TIMEOUT_S = 1800.0  # timeout of a collective call: the main rank may be writing to a slow disk
TIMEOUT_VARIABLE = "DPO_CACHE_RANK_TIMEOUT"  # environment variable with other seconds
MAX_TIMEOUT_S = 1e8  # three years

SLURM_PORTS = 20_000, 10_000  # the first port for a job, and the number of ports

Value = TypeVar("Value")
_joined: list[ProcessRanks] = []  # the ranks of the open run, if there is one
_watches = count()


class ProcessRanks(Ranks):
    """The ranks of the default process group, which has been initialised.

    Values are exchanged over a separate gloo group on all devices: they never mix with the reductions of
    gradients, and the host does not wait for a GPU.
    """

    def __init__(self, device: str | None = None, *, shards: bool = False):
        self.index, self.size = distributed.get_rank(), distributed.get_world_size()
        self.device, self.shards = device, shards
        self.watch: Watch | None = None
        self._values = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s()))

    def gather(self, value: Value) -> list[Value]:
        self._check()
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self._values)
        return found

    def share(self, value: Value) -> Value:
        self._check()
        found: list[Any] = [value]
        distributed.broadcast_object_list(found, src=0, group=self._values)
        return found[0]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            distributed.all_reduce(tensor)

    def collect(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.size)] if self.is_main else []
        distributed.gather(tensor, found or None)
        return found

    def _check(self) -> None:
        """Raise `OtherRankError` if another rank is known to have failed: the others do not reach the next
        call.
        """
        if self.watch is not None and self.watch.failure is not None:
            raise OtherRankError(self.watch.failure.text)


@contextmanager
def joined_ranks(device: str, *, shards: bool = False) -> Iterator[Ranks]:
    """The ranks that the launcher has started, or those of the process group that the caller has initialised.

    When one of them leaves the block by an exception, all do: the others raise `OtherRankError`, and those
    that wait inside a library end within seconds. A nested call yields the same ranks.
    """
    if _joined:
        yield _joined[0]
        return
    begins = not distributed.is_initialized()
    place = _begin(device) if begins else _device(device)
    with _connecting():
        ranks = ProcessRanks(place, shards=shards)
    store = distributed.distributed_c10d._get_default_store()
    number = ranks.share(next(_watches))  # the main rank's: others may have had fewer
    watch = ranks.watch = Watch(
        distributed.PrefixStore(f"dpo-cache/{number}", store), ranks.index, ranks.size
    )
    _joined.append(ranks)
    try:
        _check_devices(ranks)
        yield ranks
        ranks.gather(None)  # wait for all: the store may end with its rank
        watch.end()
    except BaseException as error:
        found = watch.report(error)
        raise found from (None if found is error else error)
    finally:
        _joined.clear()
        if begins:
            _leave(waits=not watch.failure)
        watch.end()  # not before: the watch ends a process that hangs while it leaves


def _begin(device: str) -> str:
    """Start the process group of the launched ranks. Returns this rank's device. Raises `OptionError`."""
    launched = launched_rank()
    assert launched is not None
    if device == "mps":
        raise OptionError("`device` mps: several ranks train on CUDA devices, or on CPUs.")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise OptionError(
            "accelerate is configured for DeepSpeed, which this training loop does not use.\n"
            "Configure it for several GPUs only, and shard with `parallel` fsdp."
        )
    _complete_environment(launched)
    is_cuda = device != "cpu" and torch.cuda.is_available()
    given: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s())}
    if rendezvous := os.environ.get(RENDEZVOUS):
        given |= {"init_method": rendezvous, "rank": launched.index, "world_size": launched.size}
    with _connecting():
        state = PartialState(cpu=not is_cuda, backend="cuda:nccl,cpu:gloo" if is_cuda else "gloo", **given)
    return str(state.device)


@contextmanager
def _connecting() -> Iterator[None]:
    """Turn an error of the connections between ranks into a `TrainingError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # also `DistError`
        PartialState._reset_state()
        if (launched := launched_rank()) is None:  # a program that has initialised the process group
            raise
        raise TrainingError(
            f"rank {launched.index}: the {launched.size} ranks could not connect to each other "
            f"({first_line(error)}).\n"
            "Check that all were started, and that MASTER_ADDR and MASTER_PORT are those of the first one. "
            "On machines with several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface."
        ) from error


def _leave(*, waits: bool) -> None:
    """End the process group; without `waits`, also if operations in it have not ended."""
    if not waits and torch.cuda.is_available():
        with suppress(Exception):  # NCCL may raise the error that ended the run
            distributed.distributed_c10d._abort_process_group()
    else:
        distributed.destroy_process_group()
    PartialState._reset_state()


def _complete_environment(launched: LaunchedRank) -> None:
    """Set the variables that accelerate reads, if a launcher has set others."""
    values = {
        "RANK": launched.index,
        "WORLD_SIZE": launched.size,
        "LOCAL_RANK": launched.local_index,
        "LOCAL_WORLD_SIZE": launched.local_size,
    }
    if "SLURM_JOB_ID" in os.environ:
        first, number = SLURM_PORTS
        values["MASTER_PORT"] = first + int(os.environ["SLURM_JOB_ID"]) % number
        os.environ.setdefault("MASTER_ADDR", first_node(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
    for name, value in values.items():
        os.environ.setdefault(name, str(value))
    if "OMP_NUM_THREADS" not in os.environ:  # otherwise each process uses all cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_cores() // launched.local_size))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def first_node(nodes: str) -> str:
    """The first host of SLURM's list: `gpu[07-09,12],login1` is gpu07."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    numbers, _, suffix = rest.partition("]")
    return prefix + numbers.split(",")[0].split("-")[0] + suffix.split(",")[0]


def _device(device: str) -> str | None:
    """The device of a rank whose process group the caller has initialised."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        return f"cuda:{torch.cuda.current_device()}"
    return None


def _check_devices(ranks: Ranks) -> None:
    """Raise `TrainingError` if two ranks have the same GPU, or one has another kind of device."""
    name = ranks.device or "cpu"
    kind = torch.device(name).type
    gpu = str(torch.cuda.get_device_properties(name).uuid) if kind == "cuda" else None
    found = ranks.gather((kind, gpu))
    if len({kind for kind, _ in found}) > 1:
        devices = ", ".join(f"rank {index} {kind}" for index, (kind, _) in enumerate(found))
        raise TrainingError(f"the ranks have different devices: {devices}.\nGive `device` cpu or cuda.")
    gpus = [gpu for _, gpu in found if gpu]
    for index, gpu in enumerate(gpus):
        if gpu in gpus[:index]:
            raise TrainingError(
                f"ranks {gpus.index(gpu)} and {index} have the same GPU.\n"
                "Start as many ranks on each machine as it has GPUs."
            )


def timeout_s() -> float:
    """Seconds that a collective call waits for other ranks. Raises `OptionError`."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    try:
        if 0 < float(text) <= MAX_TIMEOUT_S:
            return float(text)
    except ValueError:
        pass
    raise OptionError(f"{TIMEOUT_VARIABLE}={text}: expected seconds, a number above 0.")
