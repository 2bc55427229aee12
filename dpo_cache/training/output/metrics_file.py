"""`RUN/metrics.jsonl`: the metrics of steps and evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cache.errors import TrainingError, shown_rows
from dpo_cache.files.atomic import refused_writes, write_whole
from dpo_cache.files.sync import sync
from dpo_cache.log import Log
from dpo_cache.losses.metrics import ACCURACY, Metrics

# numbers in the line of an evaluation, after `eval/`, and of a step; both also have an accuracy, or null
OF_EVALUATION = ("loss", "num_pairs", "rewards/margins")
OF_STEP = (*OF_EVALUATION, "rewards/chosen", "rewards/rejected")
ADVICE = "Then resume the run with `resume`."  # if the file cannot be written


class MetricsFile:
    """One line for each step or evaluation, written to disk at once; `samples.jsonl` is also such a file.

    An incomplete or damaged line is skipped, wherever it is. With `has_steps`, every step has a line, and a
    line without the metrics of a step or an evaluation is damaged.
    """

    def __init__(self, path: Path, *, has_steps: bool = False):
        self.path, self._has_steps = path, has_steps

    def keep_until(self, step: int, log: Log) -> None:
        """Drop damaged lines and the lines after a step, which a run has written after its checkpoint.

        `log` gets a remark for damaged lines up to that step: no later step writes them again. The last line
        may be incomplete, because its writer was killed.
        """
        entries = list(self._entries())
        kept = [entry for _, entry in entries if entry and entry["step"] <= step]
        content = _render(kept)
        self._log_gaps(step, kept, log)
        if not self.path.exists() or self.path.read_bytes() == content.encode():
            return
        later = [number for number, entry in entries if entry and entry["step"] > step]
        end = later[0] if later else max((number for number, _ in entries), default=0)
        if damaged := [number for number, entry in entries if not entry and number < end]:
            log(
                f"{self.path}: line {shown_rows(damaged)} not readable, dropped; the other {len(kept)} lines "
                f"up to step {step} are kept."
            )
        with refused_writes(self.path, TrainingError, ADVICE):
            write_whole(self.path, content)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, which has a `step`."""
        with refused_writes(self.path, TrainingError, ADVICE), open(self.path, "ab") as file:
            file.write(_render([line]).encode())

    def fsync(self) -> None:
        """Wait until the lines are on the disk: a checkpoint must not outlive the lines before it."""
        if self.path.exists():
            with refused_writes(self.path, TrainingError, ADVICE):
                sync(self.path)

    def first(self, name: str) -> Metrics | None:
        """The first line that has this entry."""
        return next((entry for entry in self.lines() if name in entry), None)

    def last(self, name: str, *, step: int | None = None) -> Metrics | None:
        """The last line that has this entry; with `step`, the last one of that step."""
        found = [entry for entry in self.lines() if name in entry and step in (None, entry["step"])]
        return found[-1] if found else None

    def lines(self) -> list[Metrics]:
        """Every complete line."""
        return [entry for _, entry in self._entries() if entry]

    def _entries(self) -> Iterator[tuple[int, Metrics | None]]:
        """Yield the number of each line, from 1, and its content; None if it is incomplete or damaged."""
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line:
                continue
            try:
                entry = json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError):
                entry = None
            is_whole = isinstance(entry, dict) and isinstance(entry.get("step"), int)
            yield number, entry if is_whole and (not self._has_steps or _is_measured(entry)) else None

    def _log_gaps(self, step: int, kept: Sequence[Metrics], log: Log) -> None:
        """Log a remark for steps that have no line, if every step should have one."""
        if not self._has_steps:
            return
        absent = sorted({*range(1, step + 1)} - {entry["step"] for entry in kept if "loss" in entry})
        if absent:
            log(
                f"{self.path}: no line of step {shown_rows(absent)}, {len(absent)} of {step} in all; the run "
                "continues, and tables and plots lack them."
            )


def _is_measured(entry: Mapping[str, Any]) -> bool:
    prefix, needed = ("", OF_STEP) if "loss" in entry else ("eval/", OF_EVALUATION)
    return all(isinstance(entry.get(f"{prefix}{name}"), int | float) for name in needed) and isinstance(
        entry.get(f"{prefix}{ACCURACY}", ""), int | float | None
    )


def _render(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of a run")
