"""Keys of sorted shards, which are read when they are looked up, row group by row group.

The footer of a shard that `compact` made has the smallest and the largest key of each row group. So opening
the shard reads its footer only, and a look-up reads the row groups that may hold one of its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dpo_cache.store.format.keys import is_sorted, key_halves, key_order
from dpo_cache.store.key_table import find_sorted

KEPT_BYTES = 256 * 2**20  # most bytes of keys in memory: the keys of 16 million completions

ReadKeys = Callable[[str, Sequence[int]], list[np.ndarray]]  # shard, row groups -> their keys, S16


class RangedShard(NamedTuple):
    """A shard whose keys ascend from row group to row group."""

    name: str
    first_row: int  # its number in the index
    bounds: np.ndarray  # smallest and largest key of each row group, S16 `[groups, 2]`
    group_rows: Sequence[int]


class RangedKeys:
    """Row numbers by key of the shards that `add` got.

    Shards form levels: those of one level hold ranges of keys that do not overlap. A cache that was compacted
    has one level, and caches merged after each was compacted have a level each.

    Memory: 32 bytes a row group, and the first `KEPT_BYTES` of keys that were read. What does not fit is read
    again when it is looked up again, so look up many keys at once.
    """

    def __init__(self, read_keys: ReadKeys):
        self._read_keys = read_keys
        self._shards: list[RangedShard] = []
        self._levels: list[_Level] = []
        self._kept: dict[tuple[str, int], _Keys] = {}
        self._kept_bytes = 0

    def add(self, shards: Sequence[RangedShard]) -> None:
        """Enter shards; nothing is read."""
        if shards:
            self._shards.extend(shards)
            self._levels = list(map(_Level, _disjoint(self._shards)))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key (dtype S16), -1 for one that is not there: int64 `[len(keys)]`."""
        rows = np.full(len(keys), -1, np.int64)
        for level in self._levels:
            missing = np.flatnonzero(rows < 0)
            if len(missing):
                rows[missing] = self._find_in(level, keys[missing])
        return rows

    def count_keys(self, is_elsewhere: Callable[[np.ndarray], np.ndarray]) -> int:
        """Distinct keys without those that are elsewhere, too. Reads all keys."""
        count = 0
        for number, level in enumerate(self._levels):
            for shard in level.shards:
                for keys in self._read_keys(shard.name, range(len(shard.bounds))):
                    is_new = ~is_elsewhere(keys)
                    for before in self._levels[:number]:
                        is_new &= self._find_in(before, keys) < 0
                    count += int(is_new.sum())
        return count

    def _find_in(self, level: _Level, keys: np.ndarray) -> np.ndarray:
        high, low = key_halves(keys)
        order = np.argsort(high)
        high, low = high[order], low[order]
        rows = np.full(len(keys), -1, np.int64)
        starts = np.searchsorted(high, level.first)
        ends = np.searchsorted(high, level.last, side="right")
        for shard, (begin, stop) in zip(level.shards, pairwise(level.starts), strict=True):
            wanted = np.flatnonzero(starts[begin:stop] < ends[begin:stop])
            for group, (of_group, first_row) in zip(
                wanted.tolist(), self._read_groups(shard, wanted.tolist()), strict=True
            ):
                inside = slice(int(starts[begin + group]), int(ends[begin + group]))
                at = find_sorted(of_group.high, of_group.low, high[inside], low[inside])
                found = np.flatnonzero(at >= 0)
                rows[order[inside][found]] = first_row + of_group.rows_at(at[found])
        return rows

    def _read_groups(self, shard: RangedShard, groups: list[int]) -> Iterator[tuple[_Keys, int]]:
        """The keys of these row groups, each with its first row of the index."""
        missing = [group for group in groups if (shard.name, group) not in self._kept]
        read = dict(zip(missing, self._read_keys(shard.name, missing), strict=True)) if missing else {}
        starts = np.cumsum(shard.group_rows) - shard.group_rows
        for group in groups:
            if (keys := self._kept.get((shard.name, group))) is None:
                keys = _Keys.of(read.pop(group))
                if self._kept_bytes + keys.num_bytes <= KEPT_BYTES:
                    self._kept[shard.name, group] = keys
                    self._kept_bytes += keys.num_bytes
            yield keys, shard.first_row + int(starts[group])


class _Keys(NamedTuple):
    """The keys of a row group, ascending, and the row of each; None if that is its position."""

    high: np.ndarray  # uint64
    low: np.ndarray  # uint64
    rows: np.ndarray | None

    @classmethod
    def of(cls, keys: np.ndarray) -> _Keys:
        """The keys of a row group, S16, in any order."""
        order = None if is_sorted(keys) else key_order(keys)
        return cls(*key_halves(keys if order is None else keys[order]), order)

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self if column is not None)

    def rows_at(self, places: np.ndarray) -> np.ndarray:
        """The rows of the row group that these positions are."""
        return places if self.rows is None else self.rows[places]


class _Level:
    """Shards by their keys, no two of which overlap."""

    def __init__(self, shards: list[RangedShard]):
        self.shards = shards
        bounds = np.concatenate([shard.bounds for shard in shards])
        # the first halves of the smallest and the largest key of each row group
        self.first, self.last = key_halves(bounds.reshape(-1))[0].reshape(-1, 2).T
        self.starts = [0, *np.cumsum([len(shard.bounds) for shard in shards]).tolist()]


def _disjoint(shards: Sequence[RangedShard]) -> list[list[RangedShard]]:
    """The shards by their smallest keys, each in the first level whose shards it does not overlap."""
    levels: list[list[RangedShard]] = []
    for shard in sorted(shards, key=lambda shard: (bytes(shard.bounds[0, 0]), shard.name)):
        fitting = (level for level in levels if level[-1].bounds[-1, 1] < shard.bounds[0, 0])
        level = next(fitting, None)
        if level is None:
            levels.append(level := [])
        level.append(shard)
    return levels
