"""Programs in processes of their own, which have torch and all of the package imported when they start.

    program = start("train", "--cache", cache, "--output", "run")     # the command line
    program = start(script="print(1)", cwd=tmp_path)                  # or a script
    program.send_signal(signal.SIGINT)
    code, out, err = program.wait()

    server = Server(serve)                     # or a function that answers: it gets one end of a pipe
    server.ask({"question": 1})

Each is forked from one process that has imported everything: a start in a fresh interpreter takes seconds. What
is tested of imports needs a fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

START_METHOD = "forkserver"  # for `torch.multiprocessing`, too
multiprocessing.set_forkserver_preload(
    [
        "tests.conftest",
        "peft",
        "dpo_cache.cli.app",
        "dpo_cache.evaluation.run",
        "dpo_cache.precomputing.run",
        "dpo_cache.sweeping.run",
        "dpo_cache.training.loop",
    ]
)


class Done(NamedTuple):
    """The exit code of a program, and what it wrote."""

    code: int
    out: str
    err: str


class Program:
    """A program that is running, or has ended."""

    def __init__(self, process: BaseProcess, folder: Path):
        self._process, self._folder = process, folder
        assert process.pid is not None
        self.pid = process.pid

    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()

    def wait(self, limit_s: float = 240.0) -> Done:
        self._process.join(limit_s)
        code = self._process.exitcode
        assert code is not None, f"not ended within {limit_s:.0f} s"
        return Done(code, *((self._folder / name).read_text() for name in ("out", "err")))


def start(*arguments: str, script: str = "", cwd: Path | None = None) -> Program:
    """Start `dpo-cache ARGUMENTS`, or the script with these arguments."""
    folder = Path(tempfile.mkdtemp(prefix="program-"))
    process = multiprocessing.get_context(START_METHOD).Process(
        target=_run, args=(folder, script, [*map(str, arguments)], str(cwd or Path.cwd()))
    )
    process.start()
    return Program(process, folder)


def run(*arguments: str, script: str = "", cwd: Path | None = None) -> Done:
    """The same, ended."""
    return start(*arguments, script=script, cwd=cwd).wait()


class Server:
    """A process that answers until it is closed: `serve(pipe)` receives a question, sends the answer, and returns
    at `EOFError`.
    """

    def __init__(self, serve: Callable[[Connection], None]):
        context = multiprocessing.get_context(START_METHOD)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def ask(self, question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _run(folder: Path, script: str, arguments: list[str], cwd: str) -> None:
    """In the forked process."""
    for descriptor, name in enumerate(("out", "err"), 1):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    sys.argv = ["dpo-cache" if not script else "script.py", *arguments]
    (folder / "script.py").write_text(script or "from dpo_cache.cli.app import main\nmain()\n")
    runpy.run_path(str(folder / "script.py"), run_name="__main__")
