"""Compare the log-probs that several files hold of the same completion.

Files are read range by range of the keys. Keys are hashes, so ranges of equal width hold about as many
completions each, and memory is bounded by the width of a range, whatever the size of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.keys import key_halves
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, SIDES
from dpo_cache.store.format.parquet import open_unverified
from dpo_cache.store.format.shards import SHARD_SCHEMA, keys_of
from dpo_cache.store.upkeep.contents import classify
from dpo_cache.types import TOKEN_TOLERANCES

RANGE_BYTES = 128 * 2**20  # of token log-probs that are held at once
KEY_SPACE = range(2**64)  # values of a key's first 8 bytes, as a big-endian number


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


def key_ranges(num_bytes: int) -> list[range]:
    """Ranges of a key's first 8 bytes that split this many bytes of token log-probs into `RANGE_BYTES` each,
    nearly.
    """
    count = max(1, -(-num_bytes // RANGE_BYTES))
    bounds = [KEY_SPACE.stop * place // count for place in range(count + 1)]
    return [range(low, high) for low, high in pairwise(bounds)]


def read_values(folder: Folder, files: Iterable[str], keys: range) -> Values:
    """The values of score shards and of parts of pair sets (both sides of each pair) whose keys are in the
    range. Digests are not checked.
    """
    return join(values for file in files for values in _read_file(folder, file, keys))


def read_file_keys(folder: Folder, file: str) -> np.ndarray:
    """The keys of a score shard, or of a part (both sides of each pair): S16. The digest is not checked."""
    schema, columns = _columns_of(file)
    names = [key for key, _ in columns]
    with open_unverified(folder, file, schema) as reader:
        tables = list(reader.read_groups(names))
    keys = [keys_of(table.column(name)) for table in tables for name in names]
    return np.concatenate([*keys, np.empty(0, "S16")])


def _read_file(folder: Folder, file: str, keys: range) -> Iterator[Values]:
    schema, columns = _columns_of(file)
    with open_unverified(folder, file, schema) as reader:
        for table in reader.read_groups([*chain(*columns)]):
            for key, token_logps in columns:
                yield _values_in(table.column(key), table.column(token_logps), keys)


def _columns_of(file: str) -> tuple[pa.Schema, list[tuple[str, str]]]:
    """The schema of a shard or part, and its columns of keys with those of their values."""
    if classify(file)[0] == "shard":
        return SHARD_SCHEMA, [("key", "token_logps")]
    return PAIR_SCHEMA, [(f"{side}_key", f"ref_{side}_token_logps") for side in SIDES]


def _values_in(keys: pa.ChunkedArray, token_logps: pa.ChunkedArray, wanted: range) -> Values:
    lists = token_logps.combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    flat = lists.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    values = Values(keys_of(keys), np.diff(offsets), flat)
    first, _ = key_halves(values.keys)
    is_wanted = (first >= wanted.start) & (first <= wanted.stop - 1)  # 2**64 itself is no uint64
    return values if is_wanted.all() else values.take(np.flatnonzero(is_wanted))


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
    """Positions of the wanted keys that `known` has, whose keys ascend; and their positions in `known`."""
    if not len(known):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(known.keys, wanted), len(known) - 1)
    found = np.flatnonzero(known.keys[at] == wanted)
    return found, at[found]


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


def compare_files(
    folder: Folder, shards: list[str], parts: list[str], allowed: float, num_bytes: int
) -> list[Disagreement]:
    """Pairs of files, shards of one reference or parts scored by it, that differ by more than `allowed` nats
    in a token.

    Every file must be whole. `num_bytes` is the size of the shards' token log-probs. Each pair of files is
    reported once.
    """
    files = [*shards, *parts]
    if len(files) < 2 or not shards:
        return []
    apart: dict[tuple[str, str], Disagreement] = {}
    for keys in key_ranges(num_bytes):
        known, owner = _first_of_each([read_values(folder, [shard], keys) for shard in shards])
        for number, file in enumerate(files):
            values = read_values(folder, [file], keys)
            for found in _disagreements(known, owner, values, files, number, allowed):
                before = apart.get((found.file, found.other), Disagreement(found.file, found.other, 0, 0.0))
                apart[found.file, found.other] = replace(
                    before,
                    num_completions=before.num_completions + found.num_completions,
                    largest_gap=max(before.largest_gap, found.largest_gap),
                )
    return list(apart.values())


def _first_of_each(parts: list[Values]) -> tuple[Values, np.ndarray]:
    """Each completion once, by key, from the first part that has it; and the number of that part."""
    together = join(parts)
    _, first = np.unique(together.keys, return_index=True)
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return together.take(first), owner[first]


def _disagreements(
    known: Values, owner: np.ndarray, values: Values, files: list[str], number: int, allowed: float
) -> Iterator[Disagreement]:
    found, at = matches(known, values.keys)
    elsewhere = owner[at] != number
    found, at = found[elsewhere], at[elsewhere]
    gaps = largest_gaps(known.take(at), values.take(found))
    apart = ~(gaps <= allowed)
    for other in np.unique(owner[at[apart]]):
        of_other = apart & (owner[at] == other)
        yield Disagreement(files[number], files[other], int(of_other.sum()), float(gaps[of_other].max()))
