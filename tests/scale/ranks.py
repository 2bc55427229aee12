"""Run a function on several ranks: processes of this machine in one process group of gloo, on loopback.

The processes are forked from one that has imported torch and transformers, which takes seconds, and are kept for
later calls; each call has a process group of its own. A call that fails ends them, and the next call starts others.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.programs import START_METHOD

GROUP_TIMEOUT_S = 30  # of each collective call, so that a deadlock fails
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TQDM_DISABLE": "1",
    "DPO_CACHE_RANK_TIMEOUT": str(GROUP_TIMEOUT_S),
}


class RankError(AssertionError):
    """Some ranks failed; the message has their tracebacks."""


@dataclass
class _Process:
    process: Any
    pipe: Connection


_processes: list[_Process] = []


def run_ranks(function: Callable[..., Any], size: int, *args: Any, limit_s: float = 240.0) -> list[Any]:
    """What `function(ranks, *args)` returns on each of `size` ranks, in their order.

    The function is one of a module, and its arguments and results can be pickled. On one rank it runs in this
    process, with the `Ranks` of an ordinary run. Raises `RankError` where a rank raises an exception, ends,
    or takes longer than the limit.
    """
    if size == 1:
        from dpo_cache.training.ranks import Ranks

        return [function(Ranks(), *args)]
    while len(_processes) < size:
        _processes.append(_start())
    with tempfile.TemporaryDirectory() as folder:
        for index, one in enumerate(_processes[:size]):
            one.pipe.send((index, size, str(Path(folder, "store")), function, args))
        found = _collect(_processes[:size], time.monotonic() + limit_s)
    if problems := [f"rank {index}: {text}" for index, (_, text) in sorted(found.items()) if text]:
        end_processes()
        raise RankError("\n".join(problems))
    return [found[index][0] for index in range(size)]


def end_processes() -> None:
    """End the processes that are kept for later calls."""
    for one in _processes:
        one.process.kill()
        one.process.join()
        one.pipe.close()
    _processes.clear()


atexit.register(end_processes)


def _start() -> _Process:
    context = multiprocessing.get_context(START_METHOD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Process(process, ours)


def _collect(processes: list[_Process], deadline: float) -> dict[int, tuple[Any, str]]:
    """The result of each rank and, in place of it, what is wrong."""
    found: dict[int, tuple[Any, str]] = {}
    while len(found) < len(processes):
        waiting = {one.pipe: index for index, one in enumerate(processes) if index not in found}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                found[waiting[pipe]] = pipe.recv()
            except EOFError:
                processes[waiting[pipe]].process.join()
                code = processes[waiting[pipe]].process.exitcode
                found[waiting[pipe]] = None, f"the process ended with exit code {code}"
        if not ready:
            return found | dict.fromkeys(waiting.values(), (None, "did not return in time"))
    return found


def _serve(pipe: Connection) -> None:
    """Run functions until the other end is closed."""
    os.environ.update(ENVIRONMENT)
    while True:
        try:
            index, size, store, function, args = pipe.recv()
        except EOFError:
            return
        try:
            result, text = _run(index, size, store, function, args), ""
        except BaseException:
            result, text = None, traceback.format_exc()
        pipe.send((result, text))


def _run(index: int, size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    from torch import distributed

    from dpo_cache.training.distributed import ProcessRanks

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=index,
        world_size=size,
        timeout=timedelta(seconds=GROUP_TIMEOUT_S),
    )
    try:
        return function(ProcessRanks(), *args)
    finally:
        distributed.destroy_process_group()
