"""Compare the log-probs that several files hold of the same completion.

Files are read range by range of their keys (`key_ranges.py`), so time grows with the rows, and memory is
bounded by a range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.shards import keys_of
from dpo_cache.store.upkeep.key_ranges import find_overlap, key_starts, rows_by_key
from dpo_cache.types import TOKEN_TOLERANCES

GAP_TOKENS = 2**20  # so many tokens, and one completion, are compared at once


@dataclass(frozen=True)
class Values:
    """Token log-probs by completion, keys ascending: keys `[N]` (dtype S16), the file that each is of `[N]`,
    lengths `[N]`, and all values in one row.
    """

    keys: np.ndarray
    source: np.ndarray
    lengths: np.ndarray
    flat: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def starts(self) -> np.ndarray:
        """Where each completion's values begin: `[N]`."""
        return np.cumsum(self.lengths) - self.lengths


def values_of(table: pa.Table) -> Values:
    """The values in a table of `rows_by_key`."""
    lists = table.column("token_logps").combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    flat = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    source = table.column("source").to_numpy()
    return Values(keys_of(table.column("key")), source, np.diff(offsets), flat)


def largest_gaps(values: Values, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Largest gap in nats per token between the completions at these positions, pair by pair: float64
    `[len(one)]`; infinite where the number of tokens differs.
    """
    starts = values.starts
    gaps = np.where(values.lengths[one] == values.lengths[other], 0.0, np.inf)
    same = np.flatnonzero((gaps == 0) & (values.lengths[one] > 0))  # imported sums have no values
    ends = np.cumsum(values.lengths[one[same]])
    start = 0
    while start < len(same):
        done = int(ends[start - 1]) if start else 0
        end = max(int(np.searchsorted(ends, done + GAP_TOKENS, side="right")), start + 1)
        places = same[start:end]
        lengths = values.lengths[one[places]]
        begins = np.cumsum(lengths) - lengths
        left, right = (
            values.flat[np.repeat(starts[side[places]] - begins, lengths) + np.arange(lengths.sum())]
            for side in (one, other)
        )
        gaps[places] = np.maximum.reduceat(np.abs(left.astype(np.float64) - right), begins)
        start = end
    return gaps


def allowed_gap(identity: dict) -> float:
    """Largest gap in nats per token between two scores of one completion that the reference's dtype explains;
    for an unknown dtype that of bfloat16.
    """
    return TOKEN_TOLERANCES.get(str(identity.get("dtype")), TOKEN_TOLERANCES["bfloat16"])[0]


@dataclass(frozen=True)
class Disagreement:
    """Two files hold one completion with values further apart than rounding explains."""

    file: str
    other: str
    num_completions: int
    largest_gap: float


def compare_files(folder: Folder, shards: list[str], parts: list[str], allowed: float) -> list[Disagreement]:
    """Pairs of files, shards of one reference or parts scored by it, that differ by more than `allowed` nats
    in a token. A completion's value in the first shard that has it is compared with all others.

    Every file must be whole. Each pair of files is reported once. Files that share no completion with another
    are read for their keys only.
    """
    files = [*shards, *parts]
    if len(files) < 2 or not shards:
        return []
    overlapping = find_overlap([(folder, file) for file in files]).files
    num_shards = sum(place < len(shards) for place in overlapping)
    apart: dict[tuple[int, int], Disagreement] = {}
    for table in rows_by_key([(folder, files[place]) for place in overlapping]):
        for one, other, num_completions, gap in _disagreements(values_of(table), num_shards, allowed):
            names = files[overlapping[one]], files[overlapping[other]]
            before = apart.get((one, other), Disagreement(*names, 0, 0.0))
            apart[one, other] = replace(
                before,
                num_completions=before.num_completions + num_completions,
                largest_gap=max(before.largest_gap, gap),
            )
    return list(apart.values())


def _disagreements(values: Values, num_shards: int, allowed: float) -> Iterator[tuple[int, int, int, float]]:
    """The files of each pair that differ, the second one a shard; their completions, and the largest gap."""
    _, first = key_starts(values.keys)
    owner = values.source[first]
    compared = np.flatnonzero((owner < num_shards) & (values.source != owner))
    gaps = largest_gaps(values, first[compared], compared)
    is_apart = ~(gaps <= allowed)
    compared, gaps = compared[is_apart], gaps[is_apart]
    pairs = np.stack([values.source[compared], owner[compared]], axis=1)
    distinct, numbers, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    largest = np.zeros(len(distinct))
    np.maximum.at(largest, numbers, gaps)
    for (one, other), count, gap in zip(distinct.tolist(), counts.tolist(), largest.tolist(), strict=True):
        yield one, other, count, gap
