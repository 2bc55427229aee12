"""What a step or an evaluation reports, and `RUN/metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dpo_cache.errors import TrainingError

Metrics = dict[str, float | int]


class PairMetrics:
    """Means over pairs, gathered from groups of any size."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._num_pairs = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add a group of pairs: values of shape (group_size,) by name."""
        sums = torch.stack([value.detach().sum() for value in values.values()]).tolist()  # waits for the GPU once
        for name, value in zip(values, sums, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_pairs += len(next(iter(values.values())))

    def merge(self, other: PairMetrics) -> None:
        """Add the pairs of another."""
        for name, value in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_pairs += other._num_pairs

    def means(self) -> Metrics:
        """Mean of each over all pairs added, and their number."""
        return {**{name: value / self._num_pairs for name, value in self._sums.items()}, "num_pairs": self._num_pairs}


class MetricsFile:
    """`metrics.jsonl`: one line a step or evaluation, on disk as soon as it is written."""

    def __init__(self, path: Path):
        self.path = path

    def keep_until(self, step: int) -> None:
        """Drop the lines after a step, and any torn one: what a run that was cut off wrote past its checkpoint."""
        kept = [entry for entry in self._entries() if entry["step"] <= step]
        self._write("w", kept)

    def append(self, metrics: Metrics) -> None:
        """Add a line."""
        self._write("a", [metrics])

    def first(self, name: str) -> Metrics | None:
        """The first line that has this entry."""
        return next((entry for entry in self._entries() if name in entry), None)

    def last(self, name: str, *, step: int | None = None) -> Metrics | None:
        """The last line that has this entry, of a step if one is given."""
        found = [entry for entry in self._entries() if name in entry and step in (None, entry["step"])]
        return found[-1] if found else None

    def _entries(self) -> list[Metrics]:
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

    def _write(self, mode: str, entries: list[Metrics]) -> None:
        try:
            with open(self.path, mode) as file:
                file.write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries))
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror or error}.\nFree some space, then go on with --resume.") from error
