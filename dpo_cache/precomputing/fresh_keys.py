"""The completions that have scores at present, by this run or by others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from dpo_cache.store import ScoreIndex

SHARE = 0.05  # largest share of the time to spend on listing new shards, if that is slow
QUICK_S = 0.2  # a listing that takes less is repeated each time: units are scored for some 20 s


class FreshKeys:
    """Looks up keys in an index, and refreshes it first unless that is slow and was done recently."""

    def __init__(self, scores: ScoreIndex, clock: Callable[[], float] = time.perf_counter):
        self._scores, self._clock = scores, clock
        self._ended = self._took = 0.0  # time and duration of the last refresh, in s

    def contains(self, keys: Sequence[bytes]) -> np.ndarray:
        """A mask of the keys that have scores: bool `[len(keys)]`."""
        started = self._clock()
        if self._took < QUICK_S or started - self._ended >= self._took / SHARE:
            self._scores.refresh()
            self._ended = self._clock()
            self._took = self._ended - started
        return self._scores.contains(keys)
