"""Runs commands and code in this process, as far as possible: a start of Python with torch takes seconds."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple
from unittest.mock import patch

from dpo_cache.cli import app as app_module
from tests.cli.write_help import read_helps
from tests.sweeping.conftest import InlineProcess

_SHELL = re.compile(r"[|&;<>$`*?~(){}]|^\w+=")  # what needs a shell


class Done(NamedTuple):
    code: int
    output: str


def run_command(text: str) -> Done:
    """Run a command as the shell would, in the current folder."""
    words = shlex.split(text, comments=True)
    if words[-1:] == ["--help"] and len(words) == 3:
        return Done(0, _helps()[words[1]])
    if not _SHELL.search(shlex.join(words) if "#" in text else text):
        if words[0] == "dpo-cache" or words[:3] == ["python", "-m", "dpo_cache"]:
            arguments = words[1:] if words[0] == "dpo-cache" else words[3:]
            with patch("dpo_cache.sweeping.processes.start_process", InlineProcess):
                return _in_process(["dpo-cache", *arguments], app_module.main)
        if words[0] == "python" and words[1].endswith(".py"):
            return _in_process(words[1:], lambda: runpy.run_path(words[1], run_name="__main__"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", text], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Done(done.returncode, done.stdout)


def run_code(text: str, page: str, number: int, names: dict[str, Any]) -> Done:
    """Run Python code that begins at a line of a page."""
    code = compile("\n" * (number - 1) + text, page, "exec")
    with warnings.catch_warnings(), patch("dpo_cache.sweeping.processes.start_process", InlineProcess):
        warnings.simplefilter("ignore")  # of other libraries, about each other
        return _in_process(["python"], lambda: exec(code, names))


def end_accelerate() -> None:
    """Reset the state that TRL's trainer leaves in accelerate: another run in this process would see it."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@cache
def _helps() -> dict[str, str]:
    return read_helps()


def _in_process(arguments: list[str], call: Callable[[], object]) -> Done:
    before = sys.argv
    sys.argv = arguments
    code = 0
    try:
        with _captured() as file:
            try:
                call()
            except SystemExit as leaving:
                if isinstance(leaving.code, str):
                    sys.stderr.write(f"{leaving.code}\n")
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            except Exception as error:
                traceback.print_exception(error, limit=-4)
                code = 1
            sys.stdout.flush()
            file.seek(0)
            return Done(code, file.read())
    finally:
        sys.argv = before


@contextmanager
def _captured() -> Iterator[IO[str]]:
    """A file with what this process and its children write to stdout and stderr, in order."""
    streams, saved = (sys.stdout, sys.stderr), [os.dup(1), os.dup(2)]
    for stream in streams:
        stream.flush()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as file,
        io.TextIOWrapper(
            os.fdopen(os.dup(file.fileno()), "wb", buffering=0), encoding="utf-8", write_through=True
        ) as text,
    ):
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            sys.stdout = sys.stderr = text
            yield file
        finally:
            sys.stdout, sys.stderr = streams
            for descriptor, number in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
