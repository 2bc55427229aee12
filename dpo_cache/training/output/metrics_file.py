"""`RUN/metrics.jsonl`: the metrics of steps and evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import refused_writes, write_whole
from dpo_cache.files.sync import sync
from dpo_cache.losses.metrics import Metrics

ADVICE = "Then resume the run with `resume`."  # if the file cannot be written


class MetricsFile:
    """One line a step or evaluation, written to disk at once; `samples.jsonl` is such a file, too."""

    def __init__(self, path: Path):
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drop a torn line and the lines after a step, which a run has written after its checkpoint."""
        content = _render([entry for entry in self.lines() if entry["step"] <= step])
        if self.path.exists() and self.path.read_text() == content:
            return
        with refused_writes(self.path, TrainingError, ADVICE):
            write_whole(self.path, content)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, which has a `step`."""
        with refused_writes(self.path, TrainingError, ADVICE), open(self.path, "a") as file:
            file.write(_render([line]))

    def fsync(self) -> None:
        """Wait until the lines are on the disk: a checkpoint must not outlive the lines before it."""
        if self.path.exists():
            sync(self.path)

    def first(self, name: str) -> Metrics | None:
        """The first line that has this entry."""
        return next((entry for entry in self.lines() if name in entry), None)

    def last(self, name: str, *, step: int | None = None) -> Metrics | None:
        """The last line that has this entry, of a step if one is given."""
        found = [entry for entry in self.lines() if name in entry and step in (None, entry["step"])]
        return found[-1] if found else None

    def lines(self) -> list[Metrics]:
        """The lines up to the first that is torn."""
        entries: list[Metrics] = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict) or "step" not in entry:
                break
            entries.append(entry)
        return entries


def _render(entries: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
