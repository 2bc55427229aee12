"""The same completion's log-probs in several places: do they agree?

Files are gone through range by range of the keys. Keys are hashes, so ranges of equal width hold about as
many completions each, and memory is bounded by the width of a range, whatever the size of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA
from dpo_cache.store.format.parquet import ParquetReader, open_source
from dpo_cache.store.format.shards import SHARD_SCHEMA, keys_of
from dpo_cache.types import TOKEN_TOLERANCES

RANGE_BYTES = 128 * 2**20  # of token log-probs that are held at once
KEY_SPACE = 2**64  # values of a key's first 8 bytes


@dataclass(frozen=True)
class Values:
    """Token log-probs by completion: keys `[N]` (dtype S16), lengths `[N]`, and all values in one row."""

    keys: np.ndarray
    lengths: np.ndarray
    flat: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def take(self, places: np.ndarray) -> Values:
        """The completions at these places, in this order."""
        lengths = self.lengths[places]
        begins = np.cumsum(lengths) - lengths
        index = np.repeat(self.starts[places] - begins, lengths) + np.arange(lengths.sum())
        return Values(self.keys[places], lengths, self.flat[index])


@dataclass(frozen=True)
class KeyRange:
    """Keys whose first 8 bytes, as a big-endian number, are from `low` to below `high`."""

    low: int = 0
    high: int = KEY_SPACE

    def select(self, keys: np.ndarray) -> np.ndarray:
        """Which of the keys (dtype S16) are in the range: bool `[len(keys)]`."""
        if (self.low, self.high) == (0, KEY_SPACE):
            return np.ones(len(keys), bool)
        first = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)[:, 0]
        return (first >= self.low) & (first <= self.high - 1)


def key_ranges(num_bytes: int) -> list[KeyRange]:
    """As many ranges as keep each at about `RANGE_BYTES` of this many bytes of token log-probs."""
    count = max(1, -(-num_bytes // RANGE_BYTES))
    bounds = [KEY_SPACE * place // count for place in range(count + 1)]
    return [KeyRange(low, high) for low, high in pairwise(bounds)]


def shard_values(folder: Folder, name: str, keys: KeyRange = KeyRange()) -> Values:
    """What a score shard holds in the range. Its digest is not checked."""
    columns = ["key", "token_logps"]
    return join(
        _select(values_of(table, *columns), keys)
        for table in _read_groups(folder, name, SHARD_SCHEMA, columns)
    )


def part_values(folder: Folder, name: str, keys: KeyRange = KeyRange()) -> Values:
    """What a part of a pair set holds in the range, both sides of each pair. Its digest is not checked."""
    sides = [(f"{side}_key", f"ref_{side}_token_logps") for side in ("chosen", "rejected")]
    tables = _read_groups(folder, name, PAIR_SCHEMA, [column for side in sides for column in side])
    return join(_select(values_of(table, *side), keys) for table in tables for side in sides)


def _read_groups(folder: Folder, name: str, schema: pa.Schema, columns: list[str]) -> Iterator[pa.Table]:
    reader = ParquetReader(open_source(folder, name), schema, f"{folder}/{name}")
    try:
        for group in range(len(reader.group_rows)):
            yield reader.read_group(group, columns)
    finally:
        reader.close()


def values_of(table: pa.Table, key: str, token_logps: str) -> Values:
    """The values in two columns of a table."""
    lists = table.column(token_logps).combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    flat = (
        lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        if len(offsets)
        else np.empty(0, np.float32)
    )
    return Values(keys_of(table.column(key)), np.diff(offsets), flat)


def join(parts: Iterable[Values]) -> Values:
    """All of them, one after the other."""
    parts = list(parts)
    return Values(
        np.concatenate([part.keys for part in parts] or [np.empty(0, "S16")]),
        np.concatenate([part.lengths for part in parts] or [np.empty(0, np.int64)]),
        np.concatenate([part.flat for part in parts] or [np.empty(0, np.float32)]),
    )


def distinct(values: Values) -> Values:
    """Each completion once, its keys ascending."""
    return values.take(np.unique(values.keys, return_index=True)[1])


def largest_gaps(one: Values, other: Values) -> np.ndarray:
    """Largest gap in nats per token, completion by completion: float64 `[N]`; infinite where the number of
    tokens differs.
    """
    is_alike = one.lengths == other.lengths
    gaps = np.where(is_alike, 0.0, np.inf)
    same = np.flatnonzero(is_alike & (one.lengths > 0))  # imported sums have no values
    if len(same):
        left, right = one.take(same), other.take(same)
        apart = np.abs(left.flat.astype(np.float64) - right.flat)
        gaps[same] = np.maximum.reduceat(apart, left.starts)
    return gaps


def matches(known: Values, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the wanted keys stand in `known`, whose keys ascend: places among the wanted, places among the
    known.
    """
    if not len(known):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(known.keys, wanted), len(known) - 1)
    found = np.flatnonzero(known.keys[at] == wanted)
    return found, at[found]


def allowed_gap(identity: dict) -> float:
    """Largest gap in nats per token between two scores of one completion that the reference's dtype explains;
    the widest where it is unknown.
    """
    return TOKEN_TOLERANCES.get(str(identity.get("dtype")), TOKEN_TOLERANCES["bfloat16"])[0]


@dataclass(frozen=True)
class Disagreement:
    """Two files hold one completion with values further apart than rounding explains."""

    file: str
    other: str
    num_completions: int
    largest_gap: float


def compare_files(
    folder: Folder, shards: list[str], parts: list[str], allowed: float, num_bytes: int
) -> list[Disagreement]:
    """Where shards of one reference, and parts of pair sets scored by it, differ by more than `allowed` nats
    in a token.

    Every file must be whole. `num_bytes` is the size of the shards' token log-probs. Each pair of files is
    told once.
    """
    if len(shards) + len(parts) < 2 or not shards:
        return []
    told: dict[tuple[str, str], Disagreement] = {}
    for found in _compare_ranges(folder, shards, parts, allowed, num_bytes):
        before = told.get((found.file, found.other), Disagreement(found.file, found.other, 0, 0.0))
        both = before.num_completions + found.num_completions, max(before.largest_gap, found.largest_gap)
        told[found.file, found.other] = Disagreement(found.file, found.other, *both)
    return list(told.values())


def _compare_ranges(
    folder: Folder, shards: list[str], parts: list[str], allowed: float, num_bytes: int
) -> Iterator[Disagreement]:
    for keys in key_ranges(num_bytes):
        known, owner = _first_of_each([shard_values(folder, name, keys) for name in shards])
        for number, name in enumerate([*shards, *parts]):
            values = (
                shard_values(folder, name, keys) if number < len(shards) else part_values(folder, name, keys)
            )
            yield from _disagreements(known, owner, values, [*shards, *parts], number, allowed)


def _first_of_each(parts: list[Values]) -> tuple[Values, np.ndarray]:
    """Each completion once, by key, from the first part that has it; and the number of that part."""
    together = join(parts)
    _, first = np.unique(together.keys, return_index=True)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return together.take(first), owner[first]


def _disagreements(
    known: Values, owner: np.ndarray, values: Values, names: list[str], number: int, allowed: float
) -> Iterator[Disagreement]:
    found, at = matches(known, values.keys)
    elsewhere = owner[at] != number
    found, at = found[elsewhere], at[elsewhere]
    gaps = largest_gaps(known.take(at), values.take(found))
    apart = ~(gaps <= allowed)
    for other in np.unique(owner[at[apart]]):
        of_other = apart & (owner[at] == other)
        yield Disagreement(names[number], names[other], int(of_other.sum()), float(gaps[of_other].max()))


def _select(values: Values, keys: KeyRange) -> Values:
    chosen = keys.select(values.keys)
    return values if chosen.all() else values.take(np.flatnonzero(chosen))
