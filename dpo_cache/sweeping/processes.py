"""Each run of a sweep in its own process, `python -m dpo_cache train`: its remarks, steps and exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import refused_writes
from dpo_cache.files.machine import num_cores
from dpo_cache.options.base import flag_of
from dpo_cache.options.sweep import swept_fields
from dpo_cache.reporting.runs import read_resolved
from dpo_cache.sweeping.sweep_folder import Run

# Exit codes of a run that was stopped by a signal, and saved its state
ENDS_BY_SIGNAL = {130, 143, -signal.SIGINT, -signal.SIGTERM}
KILLED = -getattr(signal, "SIGKILL", 9)  # Windows has no such signal


def start_process(
    arguments: list[str], out: IO[bytes], log: IO[bytes], environment: dict[str, str], lock: int | None
) -> subprocess.Popen[bytes]:
    """Start `dpo-cache` with these arguments in another session, so that Ctrl-C reaches only the sweep, which
    passes it on.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_cache", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=log,
        env=environment,
        start_new_session=True,
        pass_fds=() if lock is None else (lock,),
    )


def train_arguments(cache: str, run: Run) -> list[str]:
    """The arguments of `dpo-cache` that start or resume the run, without the options at their defaults."""
    arguments = ["train", f"--cache={cache}", f"--output={run.folder}"]
    for entry in swept_fields():
        value = {**run.shared, **run.varied}[entry.name]
        if value == entry.default:
            continue
        if isinstance(value, bool):
            positive, _, negative = (entry.metadata["flag"] or flag_of(entry)).partition("/")
            arguments.append(positive if value else negative)
        else:
            parts = value if isinstance(value, (tuple, list)) else [value]
            arguments += [f"{flag_of(entry)}={part}" for part in parts]
    return [*arguments, *(["--resume"] if run.is_begun else []), "--json"]


class ActiveRun:
    """A run with a live process: its slot, its last step and its speed."""

    def __init__(self, cache: str, run: Run, slot: int, environment: dict[str, str], lock: int | None):
        self.run, self.slot = run, slot
        self.started = time.monotonic()
        self.last_line: dict[str, Any] | None = None  # the last line of a training step in metrics.jsonl
        self.output: list[str] = []
        self._first: tuple[float, int] | None = None  # time and number of the first step that was read
        self._metrics = _Tail(run.folder / "metrics.jsonl")
        arguments = train_arguments(cache, run)
        with refused_writes(run.log, TrainingError, "Then give the same command again."):
            run.log.parent.mkdir(exist_ok=True)
            with open(run.log, "ab") as log:
                log.write(f"$ {shlex.join(['dpo-cache', *arguments])}\n".encode())
        self._log = _Tail(run.log)
        with open(run.report_file, "wb") as out, open(run.log, "ab") as log:
            self.process = start_process(arguments, out, log, environment, lock)

    def poll(self, log: Callable[[str, str], None]) -> int | None:
        """Log new output of the run, with its name, and read its new steps. Returns its exit code; None while
        it runs.
        """
        code = self.process.poll()
        for line in self._log.lines(all_of_it=code is not None):
            self.output.append(line)
            log(self.run.name, line)
        steps = [entry for entry in map(_parsed, self._metrics.lines()) if {"loss", "step"} <= set(entry)]
        if steps:
            self._first = self._first or (time.monotonic(), steps[0]["step"])
            self.last_line = steps[-1]
        return code

    @property
    def total_steps(self) -> int | None:
        return read_resolved(self.run.folder).get("total_steps")

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the speed of this process so far, with evaluations and checkpoints; None before
        its first step.
        """
        if self.last_line is None or self._first is None or self.total_steps is None:
            return None
        step, pace = self.last_line["step"], self.last_line["num_pairs"] / self.last_line["pairs_per_s"]
        if step > self._first[1]:
            pace = (time.monotonic() - self._first[0]) / (step - self._first[1])
        return max(0.0, (self.total_steps - step) * pace)

    @property
    def seconds_in_all(self) -> float | None:
        """The estimated duration of a whole run at the speed of this one, its start included."""
        if (left := self.seconds_left) is None or self._first is None or self.total_steps is None:
            return None
        elapsed_s, before = time.monotonic() - self.started, self._first[1] - 1
        return (elapsed_s + left) * self.total_steps / (self.total_steps - before)

    def error(self, code: int) -> str:
        """The reason of the failure: its signal, its error message or the last line of its output."""
        if code < 0:
            reason = " (out of memory?)" if code == KILLED else ""
            return f"killed by {signal.Signals(-code).name}{reason}"
        _, marker, message = "\n".join(["", *self.output]).rpartition("\nerror: ")
        if marker:
            return " ".join(message.splitlines())
        return self.output[-1].strip() if self.output else f"ended with exit code {code} without any output"


def run_environment(jobs: int, slot: int) -> dict[str, str]:
    """The environment of a run: its share of the cores and, if CUDA_VISIBLE_DEVICES names several GPUs, the
    GPU of its slot.
    """
    environment = {**os.environ, "DPO_CACHE_PROGRESS": "off"}
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(threads_of_a_run(jobs)))
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return environment


def threads_of_a_run(jobs: int) -> int:
    """Threads of each of several parallel runs: OMP_NUM_THREADS if it is set, else its share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else max(1, num_cores() // jobs)


def _parsed(line: str) -> dict[str, Any]:
    """The line of a metrics file; empty if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


class _Tail:
    """The lines that another process adds to a file from now on."""

    def __init__(self, path: Path):
        self._path = path
        self._place = path.stat().st_size if path.exists() else 0

    def lines(self, *, all_of_it: bool = False) -> list[str]:
        """The complete lines added since the last call; with `all_of_it` also an incomplete last line."""
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            self._place = min(self._place, file.seek(0, os.SEEK_END))  # a resumed run removes lines
            file.seek(self._place)
            added = file.read()
        end = len(added) if all_of_it else added.rfind(b"\n") + 1
        self._place += end
        return [line for line in added[:end].decode(errors="replace").splitlines() if line.strip()]
