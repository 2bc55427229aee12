"""Workers of processes on this machine that go wrong; and processes that start quickly."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, ClassVar

from dpo_cache.lm import runner
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers import process
from dpo_cache.precomputing.workers.job import Failure, Receipt
from dpo_cache.precomputing.workers.worker import Worker
from tests.programs import START_METHOD
from tests.scale.ray_workers import NOTES
from tests.waiting import wait_until


class WrongLater(Worker):
    """Gives wrong log-probs once two workers have published."""

    def score(self, number: int, unit: Unit) -> Receipt:
        folder = Path(os.environ[NOTES])
        if len([*folder.glob("published-*")]) == 2:
            _give_wrong_values()
        receipt = super().score(number, unit)
        Path(folder, f"published-{os.getpid()}").touch()
        return receipt


class FailsAsItEnds(Worker):
    """Fails for unit 0 once another worker scores, which has an error of its own when it is ended."""

    def score(self, number: int, unit: Unit) -> Receipt:
        begun = Path(os.environ[NOTES], "begun")
        if number == 0:
            wait_until(begun.exists, "another unit")
            return Receipt(number, self.name, failure=Failure("DataError", "a problem"))
        begun.touch()
        try:
            time.sleep(600)
        except BaseException:
            return Receipt(number, self.name, failure=Failure("StorageError", "the disk is full"))
        raise AssertionError


def _give_wrong_values() -> None:
    real = runner.score_completions

    def wrong(*arguments: Any) -> Iterator[Any]:
        for step in real(*arguments):
            for _, score in step.scores:
                score.token_logps[-1] -= 0.5
            yield step

    runner.score_completions = wrong


class Forked:
    """`subprocess.Popen` of a worker that is forked from a process which has imported torch."""

    started: ClassVar[list[Forked]] = []

    def __init__(self, command: list[str], *, stdout: IO[bytes], env: dict[str, str], **_: Any):
        *_, descriptor, name = command
        connection = Connection(os.dup(int(descriptor)))
        self._process = multiprocessing.get_context(START_METHOD).Process(
            target=_serve, args=(connection, stdout.name, env, name)
        )
        self._process.start()
        connection.close()
        self.kill, self.terminate = self._process.kill, self._process.terminate
        self.started.append(self)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return self._process.exitcode


def _serve(connection: Connection, log: str, environment: dict[str, str], name: str) -> None:
    """In the forked process."""
    os.environ.update(environment)
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["process", str(os.dup(connection.fileno())), name]
    connection.close()
    process.main()
