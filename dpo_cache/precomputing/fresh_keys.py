"""Which completions are scored by now, by this run or by others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from dpo_cache.store import ScoreIndex

SHARE = 0.05  # of the time, at most, is spent on listing new shards where that is slow
QUICK_S = 0.2  # a listing that takes less is repeated each time: units are scored for some 20 s


class FreshKeys:
    """Looks keys up in an index that is refreshed before, unless that is slow and was done lately."""

    def __init__(self, scores: ScoreIndex, clock: Callable[[], float] = time.perf_counter):
        self._scores, self._clock = scores, clock
        self._ended = self._took = 0.0  # of the last refresh

    def contains(self, keys: Sequence[bytes]) -> np.ndarray:
        """Which of the keys are scored: bool `[len(keys)]`."""
        started = self._clock()
        if self._took < QUICK_S or started - self._ended >= self._took / SHARE:
            self._scores.refresh()
            self._ended = self._clock()
            self._took = self._ended - started
        return self._scores.contains(keys)
