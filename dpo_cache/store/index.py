"""Which completions a reference has scored, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError, MissingFileError, NotInCacheError, StorageError
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.folders.local_copies import is_part_name
from dpo_cache.store.format.keys import KEY_BYTES
from dpo_cache.store.format.parquet import REMEDY, ParquetReader, ParquetReaders, name_by_content
from dpo_cache.store.format.shards import SHARD_SCHEMA, check_scores, encode_shard, keys_of, read_keys
from dpo_cache.store.key_table import KeyTable
from dpo_cache.types import Score

KEY_DTYPE = f"S{KEY_BYTES}"
LISTINGS = 5  # of a folder that others compact meanwhile


class ScoreIndex:
    """The scores of one reference: a set of shards that only grows.

    Opening reads only the keys (16 bytes a completion in memory, plus 8 for its row); values are
    read, and their file's digest checked, when they are fetched.
    """

    def __init__(self, folder: Folder, place: str):
        self._folder, self._place = folder, place
        self._begin()
        self.refresh()

    def _begin(self) -> None:
        self._readers = ParquetReaders(self._folder, self._place, SHARD_SCHEMA)
        self._shards: list[str] = []
        self._starts = np.zeros(1, np.int64)  # rows in the shards before each, and in all
        self._table = KeyTable()

    def __len__(self) -> int:
        """Distinct completions."""
        return len(self._table)

    def refresh(self) -> None:
        """See the shards that were published, by anyone, since the index was opened."""
        known, keys = set(self._shards), dict[str, np.ndarray]()
        for attempt in range(1, LISTINGS + 1):
            names = [
                name
                for name in self._folder.names(self._place)
                if name.endswith(".parquet") and name not in known and name not in keys
            ]
            try:
                for name, found in zip(names, self._folder.each(self._read_keys, names), strict=True):
                    keys[name] = found
                break
            except MissingFileError:  # compacted or collected since: the next listing has its replacement
                if attempt == LISTINGS:
                    raise
        added = list(keys)
        self._add(added, [keys.pop(name) for name in added])

    def contains(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Which of the keys are scored: bool `[len(keys)]`."""
        return self._table.find(np.array(keys, KEY_DTYPE)) >= 0

    def fetch(self, keys: Sequence[bytes] | np.ndarray) -> list[Score]:
        """The scores, in the order of the keys. Each row group that holds one of them is read once.

        Where a shard was compacted since the index was opened, the shards are listed anew.
        """
        try:
            return self._fetch(keys)
        except StorageError:
            if all(self._folder.exists(f"{self._place}/{name}") for name in self._shards):
                raise
            self._begin()
            self.refresh()
            if not self.contains(keys).all():
                raise
        return self._fetch(keys)

    def _fetch(self, keys: Sequence[bytes] | np.ndarray) -> list[Score]:
        wanted = np.array(keys, KEY_DTYPE)
        rows = self._table.find(wanted)
        if (rows < 0).any():
            missing = bytes(keys[int(np.argmin(rows))])
            raise NotInCacheError(
                f"{self._folder}/{self._place}: {int((rows < 0).sum())} of {len(keys)} completions are "
                f"not scored, the first is {missing.ljust(KEY_BYTES, bytes(1)).hex()}.\n"
                "Run the `dpo-cache precompute` that made this cache again."
            )
        found: list[Score] = [Score(np.empty(0, np.float32))] * len(keys)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for shard, (start, end) in enumerate(pairwise(bounds.tolist())):
            if start < end:
                places = order[start:end]
                self._fetch_shard(shard, wanted, rows - self._starts[shard], places, found)
        return found

    def publish(
        self, scores: Sequence[tuple[bytes, Score]], record: Callable[[str], None] = lambda _: None
    ) -> int:
        """Store the scores as one new shard, durably, and index it. Returns the bytes written.

        `record` is called before a shard is published that was not there, with its name from the root.
        """
        content = encode_shard(scores)
        name = name_by_content(content)
        if not self._folder.exists(f"{self._place}/{name}"):
            record(f"{self._place}/{name}")
        self._folder.publish(f"{self._place}/{name}", content)
        if name not in self._shards:
            self._add([name], [np.array([key for key, _ in scores], KEY_DTYPE)])
        return len(content)

    def _fetch_shard(
        self, shard: int, wanted: np.ndarray, rows: np.ndarray, places: np.ndarray, found: list[Score]
    ) -> None:
        """Fill in the scores at these positions, whose rows are in this shard, ascending."""
        reader = self._readers.open(self._shards[shard])
        starts = np.concatenate([[0], np.cumsum(reader.footer.group_rows)])
        bounds = np.searchsorted(rows[places], starts)
        if bounds[-1] < len(places):
            raise CorruptShardError(f"{reader.place}: has fewer rows than when it was opened. {REMEDY}")
        for group, (start, end) in enumerate(pairwise(bounds.tolist())):
            if start < end:
                inside = places[start:end]
                values = _read_scores(reader, group, rows[inside] - starts[group], wanted[inside])
                for place, token_logps in zip(inside.tolist(), values, strict=True):
                    found[place] = Score(token_logps)

    def _add(self, names: list[str], keys: list[np.ndarray]) -> None:
        """Enter shards with their keys; the list is emptied, so that no key is held twice."""
        if not names:
            return
        first = int(self._starts[-1])
        self._shards.extend(names)
        self._starts = np.concatenate(
            [self._starts, first + np.cumsum([len(shard_keys) for shard_keys in keys], dtype=np.int64)]
        )
        together = np.concatenate(keys)
        keys.clear()
        self._table.add(together, first)

    def _read_keys(self, name: str) -> np.ndarray:
        if not is_part_name(name):
            raise CorruptShardError(f"{self._folder}/{self._place}/{name}: its name is no sha256. {REMEDY}")
        keys = read_keys(self._folder, f"{self._place}/{name}")
        if not keys:
            raise CorruptShardError(f"{self._folder}/{self._place}/{name}: has no rows. {REMEDY}")
        return np.concatenate(keys)


def _read_scores(reader: ParquetReader, group: int, rows: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """Token log-probs of these rows of a row group, which must have these keys."""
    table = reader.read_group(group)
    check_scores(table, reader.place)
    if (keys_of(table.column("key"))[rows] != wanted).any():
        raise CorruptShardError(f"{reader.place}: has other keys than when it was opened. {REMEDY}")
    # a view of the row group would keep all of it in memory
    taken = table.column("token_logps").take(pa.array(rows)).combine_chunks()
    flat = taken.values.to_numpy().copy()
    return [flat[start:end] for start, end in pairwise(taken.offsets.to_numpy().tolist())]
