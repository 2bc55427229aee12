"""A growing set of fixed-width keys in a sorted numpy array: 16 bytes for a key of 16, where a Python set
takes a hundred.
"""

from __future__ import annotations

import numpy as np


class KeySet:
    """Keys of `width` bytes, given and asked for in arrays of dtype `S<width>`."""

    def __init__(self, width: int):
        self._keys = np.empty(0, f"S{width}")

    def __len__(self) -> int:
        return len(self._keys)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys are in the set: bool `[len(keys)]`."""
        if not len(self._keys):
            return np.zeros(len(keys), bool)
        return self._keys[np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)] == keys

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Put the keys in; which of them were new, each counted at its first place: bool `[len(keys)]`."""
        distinct, first = np.unique(keys, return_index=True)
        new = ~self.contains(distinct)
        is_new = np.zeros(len(keys), bool)
        is_new[first[new]] = True
        self._keys = np.sort(
            np.concatenate([self._keys, distinct[new]]), kind="stable"
        )  # merges two sorted runs
        return is_new


def join_keys(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Keys twice as wide: each of `one` followed by its like of `other`."""
    halves = [keys.view(np.uint8).reshape(len(keys), keys.itemsize) for keys in (one, other)]
    return np.ascontiguousarray(np.concatenate(halves, axis=1)).view(f"S{2 * one.itemsize}")[:, 0]


def occurs_before(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each place, whether the wanted key stands among the keys of smaller places: bool `[len(keys)]`."""
    distinct, first = np.unique(keys, return_index=True)
    if not len(distinct):
        return np.zeros(0, bool)
    at = np.minimum(np.searchsorted(distinct, wanted), len(distinct) - 1)
    return (distinct[at] == wanted) & (first[at] < np.arange(len(keys)))
