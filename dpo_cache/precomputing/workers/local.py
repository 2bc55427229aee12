"""Units -> receipts on this machine: processes that score at once, each on its own device.

The driver hands each process one unit at a time over a socket. If a process ends, for example because the
kernel killed it when memory ran out, another process scores its unit.
"""

from __future__ import annotations

import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from dpo_cache.errors import shown_rows
from dpo_cache.log import Log
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers.environments import worker_environments
from dpo_cache.precomputing.workers.job import Failure, Job, Receipt, rows_of
from dpo_cache.precomputing.workers.process import STARTED
from dpo_cache.precomputing.workers.worker import Worker

ATTEMPTS = 3  # attempts to score a unit whose workers end, and to start a worker that finishes no unit
LOOK_S = 0.5  # seconds between checks whether a process has ended without a message
KILLED = -getattr(signal, "SIGKILL", 9)  # Windows has no such signal
STOP_S = 60.0  # seconds for a worker to publish the scores that it has computed

Numbered = tuple[int, Unit]
MakeWorker = Callable[[Job], Worker]


def score_units(
    job: Job,
    units: Callable[[int], Iterable[Numbered]],
    *,
    log: Log,
    make_worker: MakeWorker | None = None,
) -> Generator[Receipt, None, None]:
    """Yield a receipt for each unit, in any order. When it ends, or is closed, no process is left.

    `units` makes the numbered units for a number of workers; they are taken as processes need them.
    `make_worker` (default: `Worker`) is called once in each process. Raises `OptionError` for more workers
    than devices.
    """
    num_workers = job.options.num_workers
    assert num_workers is not None
    environments = worker_environments(job.options.device, num_workers)
    numbered = iter(units(num_workers))
    first = next(numbered, None)
    if first is None:
        return
    logs = Path(tempfile.mkdtemp(prefix="dpo-cache-workers-"))
    log(f"up to {num_workers} workers; each writes a log file in {logs} until the run has succeeded.")
    slots = [_Slot(number, one, logs / f"worker-{number}.log") for number, one in enumerate(environments)]
    has_failed = False
    with _ended_at_last(slots):
        pool = _Pool(job, make_worker or Worker, slots, numbered, log, deque([first]))
        for receipt in pool.receipts():
            has_failed |= receipt.failure is not None
            yield receipt
    if not has_failed:
        shutil.rmtree(logs, ignore_errors=True)


@dataclass
class _Slot:
    """A place for one process at a time."""

    number: int
    environment: dict[str, str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    connection: Connection | None = None
    has_started: bool = False
    current: Numbered | None = None  # the unit that it scores
    num_ended: int = 0  # processes that ended since the last receipt

    @property
    def is_idle(self) -> bool:
        return self.has_started and self.current is None

    @property
    def is_usable(self) -> bool:
        return self.process is not None or self.num_ended < ATTEMPTS

    def start(self) -> None:
        """Start a process in another session, so that Ctrl-C reaches only the driver, which then ends the
        process.
        """
        mine, its = socket.socketpair()
        with its, open(self.log_file, "ab") as log:
            name = f"{self.number} on {socket.gethostname()}"
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dpo_cache.precomputing.workers.process", str(its.fileno()), name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
                pass_fds=(its.fileno(),),
            )
        self.connection, self.has_started = Connection(mine.detach()), False

    def send(self, unit: Numbered) -> None:
        """Send the unit to the process. If the process has ended, a later check finds that."""
        assert self.connection is not None
        self.current = unit
        with suppress(OSError):
            self.connection.send(unit)

    def close(self) -> int:
        """End the process if it still runs, and free the slot. Returns its exit code."""
        assert self.process is not None and self.connection is not None
        self.connection.close()
        self.process.kill()
        code = self.process.wait()
        self.process = self.connection = None
        self.has_started = False
        return code


@dataclass
class _Pool:
    """Hands out units and collects receipts."""

    job: Job
    make_worker: MakeWorker
    slots: list[_Slot]
    units: Iterator[Numbered]
    log: Log
    waiting: deque[Numbered] = field(default_factory=deque)
    attempts: dict[int, list[int]] = field(default_factory=dict)  # unit -> exit codes of its workers
    has_all: bool = False  # True once all units were taken from the iterator

    def receipts(self) -> Iterator[Receipt]:
        while True:
            self._hand_out()
            busy = [slot for slot in self.slots if slot.current is not None]
            if not busy and not self.waiting:
                return
            if self.waiting and not any(slot.is_usable for slot in self.slots):
                yield self._no_workers(self.waiting.popleft())
                return
            yield from self._collect()

    def _hand_out(self) -> None:
        """Give a unit to each idle worker, start workers while units wait, and keep a unit ready for each
        worker.
        """
        for slot in self.slots:
            if slot.is_idle and self._fill(1):
                slot.send(self.waiting.popleft())
        num_starting = sum(slot.process is not None and not slot.has_started for slot in self.slots)
        for slot in self.slots:
            if slot.process is None and slot.is_usable and self._fill(num_starting + 1):
                slot.start()
                num_starting += 1
        self._fill(len(self.slots))

    def _fill(self, count: int) -> bool:
        """Take units from the iterator until `count` of them wait. Returns whether so many do."""
        while len(self.waiting) < count and not self.has_all:
            unit = next(self.units, None)
            if unit is None:
                self.has_all = True
            else:
                self.waiting.append(unit)
        return len(self.waiting) >= count

    def _collect(self) -> Iterator[Receipt]:
        """Wait until a worker sends something or ends; yield the receipts that came."""
        open_slots = {slot.connection: slot for slot in self.slots if slot.connection is not None}
        ready = wait([one for one in open_slots if one is not None], timeout=LOOK_S)
        for connection, slot in open_slots.items():
            assert connection is not None and slot.process is not None
            if connection in ready or slot.process.poll() is not None:
                try:
                    message = connection.recv() if connection.poll() else None
                except (EOFError, OSError, pickle.UnpicklingError):
                    message = None
                if message is None:
                    yield from self._after_end(slot)
                    continue
                if message == STARTED:
                    slot.has_started = True
                    with suppress(OSError):
                        connection.send((self.make_worker, self.job))
                else:
                    slot.current, slot.num_ended = None, 0
                    num_workers = sum(one.process is not None for one in self.slots)
                    yield _completed(message, num_workers, slot)

    def _after_end(self, slot: _Slot) -> Iterator[Receipt]:
        """Put back the unit of a worker that has ended; yield a failure if too many have ended with it."""
        code, unit = slot.close(), slot.current
        slot.num_ended, slot.current = slot.num_ended + 1, None
        again = "another one scores its unit" if unit else "another one is started"
        if unit is not None:
            codes = self.attempts.setdefault(unit[0], [])
            codes.append(code)
            if len(codes) == ATTEMPTS:
                yield _failure(unit, codes, slot)
                return
            self.waiting.appendleft(unit)
        if unit or self.waiting:
            self.log(f"worker {slot.number} ended {_how(code)}; {again}. Its log: {slot.log_file}")

    def _no_workers(self, unit: Numbered) -> Receipt:
        slot = self.slots[0]
        message = (
            f"no worker could start: each ended {ATTEMPTS} times.\n"
            f"The end of {slot.log_file}:\n{_last_lines(slot.log_file)}"
        )
        failure = Failure("DpoCacheError", message, rows_of(unit[1]))
        return Receipt(unit[0], str(slot.number), log_file=str(slot.log_file), failure=failure)


@contextmanager
def _ended_at_last(slots: list[_Slot]) -> Iterator[None]:
    """End all processes when the block ends: idle ones at once, the others when they have published
    the scores that they had computed.
    """
    try:
        yield
    finally:
        processes = [slot.process for slot in slots if slot.process is not None]
        try:
            for process in processes:
                process.terminate()
            deadline = time.monotonic() + STOP_S
            for process in processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for slot in slots:
                if slot.process is not None:
                    slot.close()


def _completed(receipt: Receipt, num_workers: int, slot: _Slot) -> Receipt:
    return replace(receipt, num_workers=num_workers, log_file=str(slot.log_file))


def _failure(unit: Numbered, codes: list[int], slot: _Slot) -> Receipt:
    """The receipt of a unit whose workers ended."""
    rows = rows_of(unit[1])
    advice = (
        "The kernel kills processes in this way when memory runs out: give fewer `num_workers`, or a smaller "
        "`budget_tokens`."
        if KILLED in codes
        else f"The end of {slot.log_file}:\n{_last_lines(slot.log_file)}"
    )
    message = (
        f"rows {shown_rows(rows)} of {unit[1].pair_set}: {len(codes)} workers that were to score them ended, "
        f"the last one {_how(codes[-1])}.\n{advice}"
    )
    failure = Failure("DpoCacheError", message, rows)
    return Receipt(unit[0], str(slot.number), log_file=str(slot.log_file), failure=failure)


def _how(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name if -code in [*signal.Signals] else "an unknown signal"
    return f"by signal {-code} ({name})"


def _last_lines(log_file: Path, count: int = 5) -> str:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines() if log_file.exists() else []
    return "\n".join(f"  {line}" for line in lines[-count:]) or "  (empty)"
