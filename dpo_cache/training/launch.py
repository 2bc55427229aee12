"""`launch` N: N processes of this machine that train together; and the variables that launchers set for
processes.

Works without torch. The processes meet through a file and communicate over loopback: nothing listens on a
port that other machines can reach.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.files.machine import num_cores
from dpo_cache.options.run_config import with_config

RENDEZVOUS = "DPO_CACHE_RENDEZVOUS"  # variables that `launch` sets: the file in which the processes meet
LAUNCHER = "DPO_CACHE_LAUNCHER"  # and its own process id
END_S = 30.0  # seconds from one process's failure until the others are killed
LOOK_S = 0.1
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The variables of each launcher: rank, number of ranks, and both within the machine. In a SLURM batch script,
# SLURM_PROCID is set as well, but not the number of tasks of a step.
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # accelerate launch, torchrun, `launch`
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
)


@dataclass(frozen=True)
class LaunchedRank:
    """The rank of this process in a run, from the variables that its launcher has set."""

    index: int
    size: int
    local_index: int  # index among the ranks of this machine
    local_size: int


def launched_rank(environment: Mapping[str, str] | None = None) -> LaunchedRank | None:
    """The rank that a launcher gave this process; None if it is the only one."""
    environment = os.environ if environment is None else environment
    for names in VARIABLES:
        index, size, local_index, local_size = (_number(environment, name) for name in names)
        if index is not None and size is not None and size > 1:
            return LaunchedRank(
                index, size, index if local_index is None else local_index, local_size or _tasks(environment)
            )
    return None


def is_quiet_rank() -> bool:
    """Return whether the run's remarks and its report are written by another process."""
    launched = launched_rank()
    return launched is not None and launched.index > 0


def with_launched_config(given: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """`with_config` in a process that a launcher may have started; one process of them all logs remarks.

    Raises `OptionError` also for a `launch` of another number of processes than a launcher has started.
    """
    launched, is_ours = launched_rank(), LAUNCHER in os.environ
    num_ranks = given.get("launch")
    if launched and not is_ours and num_ranks not in (None, launched.size):
        raise OptionError(
            f"`launch` {num_ranks}: a launcher has started {launched.size} processes already, and they train "
            "together.\nLeave `launch` out."
        )
    is_quiet = is_quiet_rank() or is_ours  # the process that launched this one has logged
    return with_config(
        given, (lambda _: None) if is_quiet else log, num_launched=launched.size if launched else 1
    )


def reports_early_errors() -> bool:
    """Return whether this process reports errors from before its run has joined the others: one on each
    machine.
    """
    launched = launched_rank()
    return launched is None or 0 in (launched.index, launched.local_index)


def unused_settings(parallel: str) -> list[str]:
    """A remark for each setting of `accelerate launch` or its config file that training has an option for."""
    used = {
        "ACCELERATE_MIXED_PRECISION": ("no", "mixed_precision", "`precision` decides"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "1",
            "gradient_accumulation_steps",
            "`batch_size` counts the pairs of all processes",
        ),
        "ACCELERATE_USE_FSDP": ("true" if parallel == "fsdp" else "false", "use_fsdp", "`parallel` decides"),
    }
    remarks = [
        f"{setting} {os.environ[name]} of accelerate has no effect: {reason}."
        for name, (neutral, setting, reason) in used.items()
        if os.environ.get(name, neutral).lower() != neutral
    ]
    if launched_rank() is None and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        remarks.append(
            "accelerate has started one process, as it does on CPUs without MPI. `launch` N starts N of them."
        )
    return remarks


def launch(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run `dpo-cache ARGUMENTS` in `num_ranks` processes that train together; returns the exit code.

    Ctrl-C and SIGTERM are passed on to all of them. After one has failed, the others have `END_S` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-cache-ranks-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "dpo_cache", *arguments]
        processes: list[subprocess.Popen[bytes]] = []
        with _signals_passed_on(processes):
            try:
                for index in range(num_ranks):
                    environment = {**os.environ, **_variables(index, num_ranks, Path(folder))}
                    processes.append(
                        # in its own session: the terminal's Ctrl-C arrives only through this process
                        subprocess.Popen(
                            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                        )
                    )
                return _exit_code(_wait(processes))
            finally:
                for process in processes:
                    if process.poll() is None:
                        process.kill()
                        process.wait()


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else None


def _tasks(environment: Mapping[str, str]) -> int:
    """Tasks of a SLURM step on the first machine, from `4(x2)` or `4,3`; 1 elsewhere."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")[0].split("(")[0]
    return int(tasks) if tasks.isdecimal() else 1


def _variables(index: int, size: int, folder: Path) -> dict[str, str]:
    rank = dict(zip(VARIABLES[0], map(str, (index, size, index, size)), strict=True))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // size)),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
    }
    defaults = {name: os.environ.get(name, value) for name, value in defaults.items()}
    return {**rank, **defaults, RENDEZVOUS: f"file://{folder / 'ranks'}", LAUNCHER: str(os.getpid())}


@contextmanager
def _signals_passed_on(processes: Sequence[subprocess.Popen[Any]]) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> list[int]:
    """The exit code of each process; the negative number of a signal that ended it."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > END_S:
            for process in processes:
                process.kill()
        time.sleep(LOOK_S)
    return [process.returncode for process in processes]


def _exit_code(codes: Sequence[int]) -> int:
    """The exit code of the run. If a signal ended a process and no other reports an error, this one does."""
    if reported := [code for code in codes if code > 0]:
        return max(reported)
    killed = [(index, -code) for index, code in enumerate(codes) if code < 0]
    for index, number in killed:
        sys.stderr.write(f"error: rank {index} was ended by {signal.Signals(number).name}.\n")
    return 1 if killed else 0
