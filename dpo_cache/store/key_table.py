"""A growing map from completion key to row number, in sorted numpy arrays, 24 bytes an
entry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpo_cache.store.format.keys import key_halves


class KeyTable:
    """Row numbers by key. A key that is added again keeps its first row number.

    Entries are in segments, each sorted, no key in two of them, and each at least four times as long as the
    next: adding a few keys to many does not sort the many again.
    """

    def __init__(self) -> None:
        self._segments: list[_Segment] = []

    def __len__(self) -> int:
        """Distinct keys."""
        return sum(len(segment.high) for segment in self._segments)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key (dtype S16), -1 for one that is not there: int64 `[len(keys)]`."""
        high, low = key_halves(keys)
        # look-ups in ascending order meet warm memory: five times as fast for a million
        order = np.argsort(high)
        high, low = high[order], low[order]
        rows = np.full(len(keys), -1, np.int64)
        for segment in self._segments:
            at = find_sorted(segment.high, segment.low, high, low)
            rows[order[at >= 0]] = segment.rows[at[at >= 0]]
        return rows

    def add(self, keys: np.ndarray, first_row: int) -> None:
        """Enter the keys (dtype S16) with their rows, which count up from `first_row`."""
        if self._segments:
            new = np.flatnonzero(self.find(keys) < 0)
            segment = _sorted_segment(*key_halves(keys[new]), first_row + new)
        else:
            segment = _sorted_segment(*key_halves(keys), None)
            segment.rows[:] += first_row
        while self._segments and len(self._segments[-1].high) < 4 * len(segment.high):
            before = self._segments.pop()
            segment = _sorted_segment(*map(np.concatenate, zip(before, segment, strict=True)))
        if len(segment.high):
            self._segments.append(segment)


def keys_of_pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A key (dtype S16) for each pair of numbers."""
    return np.stack([one, other], axis=1).astype(">u8").view("S16")[:, 0]


@dataclass(frozen=True, eq=False)
class _Segment:
    """Halves of keys, ascending and distinct, and the row of each."""

    high: np.ndarray  # uint64
    low: np.ndarray  # uint64
    rows: np.ndarray  # int64

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter((self.high, self.low, self.rows))


def find_sorted(in_high: np.ndarray, in_low: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The position of each key among keys that ascend, all as halves; -1 for one that is not there."""
    at = np.searchsorted(in_high, high)
    inside = np.minimum(at, len(in_high) - 1)
    same_half = in_high[inside] == high
    same = same_half & (in_low[inside] == low)
    found = np.where(same, inside, -1)
    # others share its first half: by chance hardly ever, but keys may be made so
    later = np.flatnonzero(same_half & ~same)
    if len(later):
        found[later] = _find_low(in_high, in_low, high[later], low[later])
    return found


def _find_low(in_high: np.ndarray, in_low: np.ndarray, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The position of each key whose first half is there, by bisection among those that share it."""
    start, end = np.searchsorted(in_high, high), np.searchsorted(in_high, high, side="right")
    stop = end.copy()
    while (start < end).any():
        middle = (start + end) // 2
        before = (start < end) & (in_low[np.minimum(middle, len(in_low) - 1)] < low)
        start, end = np.where(before, middle + 1, start), np.where(before | (start >= end), end, middle)
    at = np.minimum(start, len(in_low) - 1)
    return np.where((start < stop) & (in_low[at] == low), at, -1)


def _sorted_segment(high: np.ndarray, low: np.ndarray, rows: np.ndarray | None) -> _Segment:
    """These entries by key; of equal keys the one with the smallest row. Without rows they are numbered from
    0.

    Careful with memory: sorting takes 24 bytes a key, and no other array of that size may be kept meanwhile.
    """
    order = np.arange(len(high)) if (high[1:] > high[:-1]).all() else np.argsort(high)
    if (high[order[1:]] == high[order[:-1]]).any():
        order = np.lexsort((low, high) if rows is None else (rows, low, high))
    high = high[order]
    low = low[order]
    rows = order if rows is None else rows[order]
    repeated = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    if repeated.any():
        kept = np.concatenate([[True], ~repeated])
        high, low, rows = high[kept], low[kept], rows[kept]
    return _Segment(high, low, rows)
