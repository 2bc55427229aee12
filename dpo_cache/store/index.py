"""An index of the completions that a reference has scored, and of their scores."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from dpo_cache.store.format.page_limits import Footer
from dpo_cache.store.format.parquet import REMEDY, ParquetReader, ParquetReaders, open_unverified
from dpo_cache.store.format.shards import SHARD_SCHEMA, check_bounds, check_scores, group_bounds, keys_of
from dpo_cache.store.key_table import KeyTable
from dpo_cache.store.ranged_keys import RangedKeys, RangedShard
from dpo_cache.store.score_writer import publish_scores
from dpo_cache.types import Score

KEY_DTYPE = f"S{KEY_BYTES}"
LISTINGS = 5  # attempts to list a folder that another process compacts meanwhile

_Keys = np.ndarray | Footer  # all keys of a shard, S16; or its footer, if its keys are read later


class ScoreIndex:
    """The scores of one reference: a set of shards that only grows.

    Opening reads the footers of compacted shards, whose keys are read when they are looked up (memory: see
    `RangedKeys`), and the keys of all other shards (16 bytes a completion in memory, plus 8 for its row).
    Values are read, and their file's digest checked, when they are fetched.

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
        self._shards: dict[str, None] = {}  # in their order
        self._starts = [0]  # rows in the shards before each, and in all
        self._table = KeyTable()
        self._ranged = RangedKeys(self._read_groups)

    def __len__(self) -> int:
        """Distinct completions. Reads all keys of compacted shards."""
        return len(self._table) + self._ranged.count_keys(lambda keys: self._table.find(keys) >= 0)

    def refresh(self) -> None:
        """See the shards that were published, by anyone, since the index was opened."""
        known, keys = self._shards.keys() | self._left_out.keys(), dict[str, _Keys]()
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
        self._add(keys)

    def contains(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """A mask of the keys that are scored: bool `[len(keys)]`.

        If a shard whose keys are read now was compacted since the index was opened, or cannot be read, it is
        replaced or left out as in opening.
        """
        wanted, listings = np.array(keys, KEY_DTYPE), 0
        while True:
            try:
                return self._find(wanted) >= 0
            except (StorageError, CorruptShardError) as error:
                is_missing = isinstance(error, MissingFileError)
                listings += is_missing
                if listings == LISTINGS or not (is_missing or _is_of_one_file(error)):
                    raise
                if not is_missing:
                    self._log_left_out([error])
            self._begin()
            self.refresh()

    def _find(self, wanted: np.ndarray) -> np.ndarray:
        """The row of each key, -1 for one that is not scored. A shard whose keys cannot be read is noted in
        `_left_out`, and its error raised.
        """
        rows = self._table.find(wanted)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            rows[missing] = self._ranged.find(wanted[missing])
        return rows

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
        rows = self._find(wanted)
        if (rows < 0).any():
            raise self._not_scored(keys, rows)
        found: list[Score] = [Score(np.empty(0, np.float32))] * len(keys)
        order = np.argsort(rows, kind="stable")
        bounds = pairwise(np.searchsorted(rows[order], self._starts).tolist())
        for name, first_row, (start, end) in zip(self._shards, self._starts, bounds, strict=False):
            if start < end:
                places = order[start:end]
                with self._noting_left_out(name):
                    self._fetch_shard(name, wanted[places], rows[places] - first_row, places, found)
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
        self.add_published(name, np.array([key for key, _ in scores], KEY_DTYPE))
        return num_bytes

    def add_published(self, name: str, keys: np.ndarray) -> None:
        """Index a shard that was published, by its name and the keys (dtype S16) of its rows. Nothing is
        read.
        """
        self._left_out.pop(name, None)
        if name not in self._shards:
            self._add({name: keys})

    def _fetch_shard(
        self, name: str, wanted: np.ndarray, rows: np.ndarray, places: np.ndarray, found: list[Score]
    ) -> None:
        """Fill in the scores at these positions, which have these keys and rows of this shard, ascending."""
        reader = self._readers.open(name)
        starts = np.concatenate([[0], np.cumsum(reader.footer.group_rows)])
        bounds = np.searchsorted(rows, starts)
        if bounds[-1] < len(places):
            raise CorruptShardError(f"{reader.place}: has fewer rows than when it was opened. {REMEDY}")
        for group, (start, end) in enumerate(pairwise(bounds.tolist())):
            if start < end:
                values = _read_scores(reader, group, rows[start:end] - starts[group], wanted[start:end])
                for place, token_logps in zip(places[start:end].tolist(), values, strict=True):
                    found[place] = Score(token_logps)

    def _add(self, keys: dict[str, _Keys]) -> None:
        """Enter shards with their keys; the dictionary is emptied, so that no key is held twice."""
        first, read, ranged = self._starts[-1], [np.empty(0, KEY_DTYPE)], list[RangedShard]()
        # the rows of keys that were read are adjacent
        for name in sorted(keys, key=lambda name: isinstance(keys[name], Footer)):
            found = keys.pop(name)
            if isinstance(found, Footer):
                ranged.append(RangedShard(name, self._starts[-1], _bounds_of(found), found.group_rows))
            else:
                read.append(found)
            num_rows = found.num_rows if isinstance(found, Footer) else len(found)
            self._shards[name] = None
            self._starts.append(self._starts[-1] + num_rows)
        together = np.concatenate(read)
        read.clear()
        self._table.add(together, first)
        self._ranged.add(ranged)

    def _read_each(self, names: list[str], keys: dict[str, _Keys]) -> None:
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

    @contextmanager
    def _noting_left_out(self, name: str) -> Iterator[None]:
        """Note an error that is of this shard only, and raise it."""
        try:
            yield
        except (StorageError, CorruptShardError) as error:
            if _is_of_one_file(error):
                self._left_out[name] = error
            raise

    def _read_groups(self, name: str, groups: Sequence[int]) -> list[np.ndarray]:
        """The keys of these row groups of a compacted shard."""
        place, found = f"{self._place}/{name}", list[np.ndarray]()
        with self._noting_left_out(name), open_unverified(self._folder, place, SHARD_SCHEMA) as reader:
            bounds = group_bounds(reader.footer)
            if bounds is None or len(bounds) <= max(groups):
                raise CorruptShardError(f"{reader.place}: has other keys than when it was opened. {REMEDY}")
            for group in groups:
                found.append(keys_of(reader.read_group(group, ["key"]).column("key")))
                check_bounds(found[-1], bounds[group], reader.place)
        return found

    def _try_keys(self, name: str) -> _Keys | CacheError:
        """The keys of a shard, or why this one file cannot be read; other errors are raised."""
        try:
            return self._read_keys(name)
        except (StorageError, CorruptShardError) as error:
            if not _is_of_one_file(error):
                raise
            return error

    def _read_keys(self, name: str) -> _Keys:
        if not is_part_name(name):
            raise CorruptShardError(
                f"{self._folder}/{self._place}/{name}: its name is not a sha256. {REMEDY}"
            )
        with open_unverified(self._folder, f"{self._place}/{name}", SHARD_SCHEMA) as reader:
            if len(reader.footer.group_rows) > 1 and group_bounds(reader.footer) is not None:
                return reader.footer
            keys = [keys_of(table.column("key")) for table in reader.read_groups(["key"])]
        if not keys:
            raise CorruptShardError(f"{self._folder}/{self._place}/{name}: has no rows. {REMEDY}")
        return np.concatenate(keys)


def _bounds_of(footer: Footer) -> np.ndarray:
    bounds = group_bounds(footer)
    assert bounds is not None  # else its keys would have been read
    return bounds


def _is_of_one_file(error: CacheError) -> bool:
    """Return whether the error is of this file and no other: damage, a refused permission, a bad sector. A
    disk or a store that is gone, or too many open files, would make every shard look unreadable.
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
