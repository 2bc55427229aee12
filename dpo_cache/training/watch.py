"""Ranks of a run that watch each other: when one fails or disappears, all end, and one of them reports it.

A rank that fails writes its failure to the store of the process group before it ends. In a thread, every rank
checks the store twice a second, and checks that the other ranks of its machine are alive. Ranks of other
machines count as alive while they change a number in the store. The main thread of a rank may wait inside a
library for a lost rank: if it does not return by itself, the checking thread ends the process.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from dpo_cache.errors import DpoCacheError, OptionError, OtherRankError, TrainingError, printable_lines
from dpo_cache.files.machine import running_kernel
from dpo_cache.training.launch import LAUNCHER

LOOK_S = 0.5
BEAT_S = 5.0
SILENT_S = 25.0  # seconds without a new number after which a rank of another machine counts as lost
END_S = 10.0  # seconds for the main thread to end by itself
# Seconds that a rank with an error waits in case another rank's failure caused it: for a lost connection; and
# in case all ranks have the same error, which then only the main rank reports.
FOLLOWS_S, SAME_S = 4.0, 1.0
NOTED_S = 5.0  # seconds for the other ranks to read of a failure, before the store may be gone
INTERRUPTED = 130


@dataclass(frozen=True)
class Failure:
    """A rank that failed or was lost, the text of its error, and the rank that reports it."""

    rank: int
    text: str
    code: int  # exit code of all processes
    reporter: int


class Watch:
    """Watches the other ranks until `end`; `report` is for a rank's own exception."""

    def __init__(self, store: Any, index: int, size: int):
        self.index, self.size = index, size
        self.failure: Failure | None = None
        self._store, self._known, self._ended = store, threading.Event(), threading.Event()
        self._launcher = int(os.environ.get(LAUNCHER, 0))
        self._processes: dict[int, psutil.Process] = {}  # ranks of this machine
        self._beats: dict[int, tuple[bytes, float]] = {}  # others' numbers, and when they changed
        store.set(f"process/{index}", json.dumps(_this_process()))
        for other in range(size):
            found = _process(json.loads(store.get(f"process/{other}")))  # waits until it is there
            if found is not None:
                self._processes[other] = found
            else:
                self._beats[other] = b"", time.monotonic()
        threading.Thread(target=self._keep_looking, name="ranks", daemon=True).start()

    def report(self, error: BaseException) -> BaseException:
        """The exception with which this rank ends: its own, if this is the first rank to fail.

        Then the others are notified. Otherwise it is an `OtherRankError`, or the error of a lost rank.
        """
        if isinstance(error, KeyboardInterrupt):  # each rank gets the signal
            self._claim(Failure(self.index, "interrupted", INTERRUPTED, self.index))
            self._wait_until_noted()
            return error
        is_known = isinstance(error, DpoCacheError)
        self._known.wait((SAME_S if self.index else 0.0) if is_known else FOLLOWS_S)
        found = self.failure
        failure = found or self._claim(
            Failure(self.index, _text(error), 2 if isinstance(error, OptionError) else 1, self.index)
        )
        if failure.reporter != self.index:
            return OtherRankError(f"rank {failure.rank} failed: {failure.text}", failure.code)
        if found is not None:  # found by the thread of this rank
            error = TrainingError(failure.text)
        elif isinstance(error, DpoCacheError) and self.index:
            error.args = (f"rank {self.index}: {error}",)
        if isinstance(error, DpoCacheError):
            error.rank = self.index
        self._wait_until_noted()
        return error

    def end(self) -> None:
        """Stop watching, so that this rank may leave."""
        with suppress(Exception):  # the store may be gone with its rank
            self._store.set(f"ended/{self.index}", "1")
        self._ended.set()

    # -- the thread ------------------------------------------------------------------------------------

    def _keep_looking(self) -> None:
        num_errors, next_beat = 0, 0.0
        while not self._ended.wait(LOOK_S):
            try:
                if self._beats and time.monotonic() >= next_beat:  # other machines cannot see this process
                    self._store.set(f"beat/{self.index}", str(time.monotonic()))
                    next_beat = time.monotonic() + BEAT_S
                self.failure, num_errors = self._look(), 0
            except Exception:  # the rank with the store is gone, or the network is slow
                num_errors += 1
                if num_errors == 3:
                    self.failure = Failure(0, _lost(0, "which holds the shared store"), 1, self._first_here())
            if self.failure:
                break
        else:
            return
        self._known.set()
        with suppress(Exception):
            self._store.add("noted", 1)
        if not self._ended.wait(END_S):
            self._end_process(self.failure)

    def _look(self) -> Failure | None:
        if self._store.check(["failure"]):
            return Failure(**json.loads(self._store.get("failure")))
        if self._launcher and os.getppid() != self._launcher:
            return self._claim(
                Failure(self.index, "the process that started the ranks is gone.", 1, self.index)
            )
        for other in range(self.size):
            if other != self.index and self._is_lost(other):
                return self._claim(Failure(other, _lost(other, self._name(other)), 1, self.index))
        return None

    def _is_lost(self, other: int) -> bool:
        if other in self._processes:
            is_gone = not _is_alive(self._processes[other])
        elif 0 not in (self.index, other):  # the main rank watches all, and all watch the main rank
            return False
        else:
            is_gone = self._is_silent(other)
        return is_gone and not self._store.check([f"ended/{other}"]) and not self._store.check(["failure"])

    def _is_silent(self, other: int) -> bool:
        key, (before, since) = f"beat/{other}", self._beats[other]
        beat = self._store.get(key) if self._store.check([key]) else b""
        if beat != before:
            self._beats[other] = beat, time.monotonic()
            return False
        return time.monotonic() - since > SILENT_S

    def _claim(self, failure: Failure) -> Failure:
        """The first failure in the store, which is the one to report."""
        try:
            found = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
        except Exception:  # the store is gone
            return failure
        self.failure = Failure(**json.loads(found))
        return self.failure

    def _wait_until_noted(self) -> None:
        """Give the other ranks time to read of the failure, because the store may end with this process."""
        deadline = time.monotonic() + NOTED_S
        with suppress(Exception):
            while time.monotonic() < deadline and self._store.add("noted", 0) < self.size:
                time.sleep(LOOK_S / 5)

    def _name(self, other: int) -> str:
        found = json.loads(self._store.get(f"process/{other}"))
        return f"process {found['pid']} on {found['name']}"

    def _first_here(self) -> int:
        """The lowest rank that this one knows to be alive on its machine."""
        return min([self.index, *(rank for rank, one in self._processes.items() if _is_alive(one))])

    def _end_process(self, failure: Failure) -> None:
        if failure.reporter == self.index:  # normally the main thread reports it
            sys.stderr.write(f"error: {printable_lines(failure.text)}\n")
            sys.stderr.flush()
        os._exit(failure.code)


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, DpoCacheError) else f"{type(error).__name__}: {error}"


def _lost(rank: int, name: str) -> str:
    return (
        f"rank {rank}, {name}, ended without reporting an error: it was killed, or its machine is gone. The "
        "system kills processes when memory runs out.\nContinue from the last checkpoint with `resume`."
    )


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "kernel": running_kernel(),
        "name": platform.node(),
        "pid": process.pid,
        "started": process.create_time(),
    }


def _process(described: dict[str, Any]) -> psutil.Process | None:
    """The process, if it can be seen from here: it may be in another container of the same machine."""
    if described["kernel"] != running_kernel():
        return None
    try:
        found = psutil.Process(described["pid"])
        return found if abs(found.create_time() - described["started"]) < 1 else None
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
