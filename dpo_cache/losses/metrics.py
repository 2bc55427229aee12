"""Means over pairs of the losses and metrics of a step or an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from dpo_cache.losses.ties import accuracy_of

Metrics = dict[str, Any]  # numbers; an accuracy is None where margins are rounding noise
ACCURACY = "rewards/accuracies"
TIES = "rewards/ties"  # of each pair: 1 if its margin is rounding noise; not in the means


class PairMetrics:
    """Means over pairs, gathered from groups of any size."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._num_pairs = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add a group of pairs: values of shape (group_size,) by name."""
        sums = torch.stack([value.detach().sum() for value in values.values()])
        # tolist waits for the GPU: once for all of them
        self._add(dict(zip(values, sums.tolist(), strict=True)), len(next(iter(values.values()))))

    def merge(self, other: PairMetrics) -> None:
        """Add the pairs of another."""
        self._add(other._sums, other._num_pairs)

    @classmethod
    def merged(cls, parts: Iterable[PairMetrics]) -> PairMetrics:
        """Those of the pairs of all parts."""
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    def _add(self, sums: dict[str, float], num_pairs: int) -> None:
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_pairs += num_pairs

    def means(self) -> Metrics:
        """The mean of each value over all pairs, and their number; no accuracy if nearly all are ties."""
        means: Metrics = {name: value / self._num_pairs for name, value in self._sums.items()}
        if (ties := means.pop(TIES, None)) is not None:
            means[ACCURACY] = accuracy_of(means[ACCURACY] - ties / 2, ties, 1)
        return {**means, "num_pairs": self._num_pairs}

    @property
    def is_finite(self) -> bool:
        """Return whether no pair so far has a loss that is not finite."""
        return math.isfinite(self._sums.get("loss", 0.0))
