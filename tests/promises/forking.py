"""A process that has imported everything once and forks a run for each job it is given, so that runs that
are killed cost little.

    ({"arguments": [...], ...}, ...)   ->  the jobs' process ids
    ()                                 ->  the exit codes of those, when all have ended

Until it is asked, a process that has ended keeps its number, so none but a job can be killed by it.
A job runs the command line in a process of its own. Its log says, a line each, as it happens: `scored KEY...`
when a chunk's scores are in memory, `kept` when all scores in memory are published, `loading`, `writing`, and
at last `steps N`. A job may set `flush_s`, `chunk_s` (seconds a chunk takes longer), `loading_s`, `writing_s`
(seconds for the loading of the model and for each score shard) and `die_at` (the step on the disk at which it
kills itself).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.programs import Server


class Runs:
    """The forking process, seen from a test."""

    def __init__(self) -> None:
        self._server = Server(serve)

    def start(self, *jobs: dict[str, Any]) -> list[int]:
        """Process ids; the jobs start at once."""
        return self._server.ask(jobs)

    def wait(self) -> list[int]:
        """Exit codes of the jobs that were started last, when all have ended; minus the signal's number for
        those killed.
        """
        return self._server.ask(())

    def run(self, *jobs: dict[str, Any]) -> list[int]:
        self.start(*jobs)
        return self.wait()

    def close(self) -> None:
        self._server.close()


def read_log(path: Path) -> list[list[str]]:
    """The words of each line so far."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(path: Path, word: str, times: int = 1, limit_s: float = 60.0) -> None:
    """Until the log has that many lines that begin with the word."""
    deadline = time.monotonic() + limit_s
    while sum(line[0] == word for line in read_log(path)) < times:
        assert time.monotonic() < deadline, f"{path}: {read_log(path)}"
        time.sleep(0.005)


# -- inside the forking process ----------------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    pids: list[int] = []
    while True:
        try:
            jobs = pipe.recv()
        except EOFError:
            return
        if jobs:
            pids = [_fork(job) for job in jobs]
            pipe.send(pids)
        else:
            pipe.send([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


def _fork(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    with open(job["output"], "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    code = 70
    try:
        _run(job)
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _run(job: dict[str, Any]) -> None:
    from dpo_cache.cli import app
    from dpo_cache.lm import runner
    from dpo_cache.precomputing import units
    from dpo_cache.precomputing.audit import Audit
    from dpo_cache.store import ScoreIndex, completion_key
    from dpo_cache.store.folders import local
    from tests.promises.refusals import TroubledDisk

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words: object) -> None:
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    def disturb(number: int, step: str, arguments: tuple) -> None:
        if number == job.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "write" and len(arguments[1]) > 1000 and job.get("writing_s"):
            note("writing")
            time.sleep(job["writing_s"])

    auditing: list[bool] = []

    def audit_first(self: Any, entries: Any, real: Any = Audit._audit_first) -> None:
        auditing.append(True)
        real(self, entries)
        auditing.clear()

    def scored(
        model: Any, completions: Any, *arguments: Any, real: Any = runner.score_completions
    ) -> Iterator[Any]:
        if auditing:  # the first sample, which is scored again later
            yield from real(model, completions, *arguments)
            return
        for progress in real(model, completions, *arguments):
            time.sleep(job.get("chunk_s", 0.0))
            yield progress
            note("scored", *(completion_key(completions[index]).hex() for index, _ in progress.scores))

    def published(self: Any, scores: Any, *rest: Any, real: Any = ScoreIndex.publish) -> int:
        size = real(self, scores, *rest)
        note("kept", *(key.hex() for key, _ in scores))
        return size

    def loaded(*arguments: Any, real: Any = runner.load_model, **options: Any) -> Any:
        note("loading")
        time.sleep(job.get("loading_s", 0.0))
        return real(*arguments, **options)

    disk = TroubledDisk(disturb)
    local.Disk = lambda: disk  # type: ignore[assignment,misc]
    runner.score_completions, runner.load_model = scored, loaded  # type: ignore[assignment]
    units.FLUSH_S = job.get("flush_s", units.FLUSH_S)
    Audit._audit_first = audit_first  # type: ignore[method-assign]
    ScoreIndex.publish = published  # type: ignore[method-assign]
    sys.argv = ["dpo-cache", "precompute", *job["arguments"]]
    try:
        app.main()
    finally:
        note("steps", disk.num_steps)
