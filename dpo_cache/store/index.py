"""Which completions a reference has scored, and their scores."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from dpo_cache.errors import (
    CacheError,
    CorruptShardError,
    MissingFileError,
    NotInCacheError,
    StorageError,
    first_line,
)
from dpo_cache.log import log_remark
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.folders.local_copies import is_part_name
from dpo_cache.store.format.keys import KEY_BYTES
from dpo_cache.store.format.parquet import REMEDY, ParquetReader, ParquetReaders
from dpo_cache.store.format.shards import SHARD_SCHEMA, check_scores, keys_of, read_keys
from dpo_cache.store.key_table import KeyTable
from dpo_cache.store.score_writer import publish_scores
from dpo_cache.types import Score

KEY_DTYPE = f"S{KEY_BYTES}"
LISTINGS = 5  # of a folder that others compact meanwhile


class ScoreIndex:
    """The scores of one reference: a set of shards that only grows.

    Opening reads only the keys (16 bytes a completion in memory, plus 8 for its row); values are
    read, and their file's digest checked, when they are fetched.

    A shard that is damaged, or that this user may not read, is left out with a remark: completions that only
    it holds count as not scored, and fetching them raises its error.
    """

    def __init__(self, folder: Folder, place: str):
        self._folder, self._place = folder, place
        self._left_out: dict[str, CacheError] = {}  # shards, and why
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
        known, keys = {*self._shards, *self._left_out}, dict[str, np.ndarray]()
        for attempt in range(1, LISTINGS + 1):
            names = [
                name
                for name in self._folder.names(self._place)
                if name.endswith(".parquet") and name not in known and name not in keys
            ]
            try:
                self._read_each(names, keys)
                break
            except MissingFileError:  # compacted or collected since: the next listing has its replacement
                if attempt == LISTINGS:
                    raise
        found = list(keys)
        self._add(found, [keys.pop(name) for name in found])

    def contains(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """Which of the keys are scored: bool `[len(keys)]`."""
        return self._table.find(np.array(keys, KEY_DTYPE)) >= 0

    def fetch(self, keys: Sequence[bytes] | np.ndarray) -> list[Score]:
        """The scores, in the order of the keys. Each row group that holds one of them is read once.

        If a shard was compacted since the index was opened, or cannot be read now, other shards are searched
        for its completions. Raises `NotInCacheError` for completions that are not scored, and the error of a
        shard that was left out where it may hold them.
        """
        before, first = {**vars(self), "_left_out": dict(self._left_out)}, None
        for _ in range(len(self._shards) + LISTINGS):
            try:
                return self._fetch(keys)
            except (StorageError, CorruptShardError) as error:
                if not isinstance(error, MissingFileError) and not _is_of_one_file(error):
                    raise
                first, last = first or error, error
            if isinstance(last, MissingFileError):
                before = {}  # compacted: the old table is of no use, and takes memory
            self._begin()
            self.refresh()
            if not self.contains(keys).all():
                break
            if not isinstance(last, MissingFileError):
                self._log_left_out([last])
        vars(self).update(before)  # the next call may find the shard readable again
        assert first is not None
        raise first

    def _fetch(self, keys: Sequence[bytes] | np.ndarray) -> list[Score]:
        wanted = np.array(keys, KEY_DTYPE)
        rows = self._table.find(wanted)
        if (rows < 0).any():
            raise self._not_scored(keys, rows)
        found: list[Score] = [Score(np.empty(0, np.float32))] * len(keys)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self._starts)
        for shard, (start, end) in enumerate(pairwise(bounds.tolist())):
            if start < end:
                places = order[start:end]
                try:
                    self._fetch_shard(shard, wanted, rows - self._starts[shard], places, found)
                except (StorageError, CorruptShardError) as error:
                    if _is_of_one_file(error):
                        self._left_out[self._shards[shard]] = error
                    raise
        return found

    def _not_scored(self, keys: Sequence[bytes] | np.ndarray, rows: np.ndarray) -> CacheError:
        """The error for keys without a row."""
        for error in self._left_out.values():
            return error
        missing = bytes(keys[int(np.argmin(rows))])
        return NotInCacheError(
            f"{self._folder}/{self._place}: {int((rows < 0).sum())} of {len(keys)} completions are "
            f"not scored, the first is {missing.ljust(KEY_BYTES, bytes(1)).hex()}.\n"
            "Run the `dpo-cache precompute` that made this cache again."
        )

    def publish(
        self, scores: Sequence[tuple[bytes, Score]], record: Callable[[str], None] = lambda _: None
    ) -> int:
        """Store the scores as one new shard, durably, and index it. Returns the bytes written.

        `record` is called before a shard is published that was not there, with its name from the root.
        """
        name, num_bytes = publish_scores(self._folder, self._place, scores, record)
        self._left_out.pop(name, None)
        if name not in self._shards:
            self._add([name], [np.array([key for key, _ in scores], KEY_DTYPE)])
        return num_bytes

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

    def _read_each(self, names: list[str], keys: dict[str, np.ndarray]) -> None:
        """Enter the keys of the shards that can be read; the others are left out."""
        failed = dict[str, CacheError]()
        for name, found in zip(names, self._folder.each(self._try_keys, names), strict=True):
            if isinstance(found, CacheError):
                failed[name] = found
            else:
                keys[name] = found
        for error in failed.values():
            if _errno(error) == errno.EIO and not keys and not self._shards:
                raise error  # no shard can be read: it is the disk
        if failed:
            self._left_out |= failed
            self._log_left_out(list(failed.values()))

    def _log_left_out(self, errors: list[CacheError]) -> None:
        shards = "a score shard is" if len(errors) == 1 else f"{len(errors)} score shards are"
        log_remark(
            f"{self._folder}/{self._place}: {shards} left out, and completions that no other shard holds "
            f"count as not scored: {first_line(errors[0])}\n"
            f"`dpo-cache verify {self._folder}` lists all that is damaged or cannot be read."
        )

    def _try_keys(self, name: str) -> np.ndarray | CacheError:
        """The keys of a shard, or why this one file cannot be read; other errors are raised."""
        try:
            return self._read_keys(name)
        except (StorageError, CorruptShardError) as error:
            if not _is_of_one_file(error):
                raise
            return error

    def _read_keys(self, name: str) -> np.ndarray:
        if not is_part_name(name):
            raise CorruptShardError(f"{self._folder}/{self._place}/{name}: its name is no sha256. {REMEDY}")
        keys = read_keys(self._folder, f"{self._place}/{name}")
        if not keys:
            raise CorruptShardError(f"{self._folder}/{self._place}/{name}: has no rows. {REMEDY}")
        return np.concatenate(keys)


def _is_of_one_file(error: CacheError) -> bool:
    """Whether the error is of this file and no other: damage, a refused permission, a bad sector. A disk or a
    store that is gone, or too many open files, would make every shard look unreadable.
    """
    is_denied = isinstance(error, StorageError) and error.is_denied
    return isinstance(error, CorruptShardError) or is_denied or _errno(error) == errno.EIO


def _errno(error: CacheError) -> int | None:
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


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
