"""Rows of many files in the order of their keys, one range of keys in memory at a time.

    for table in rows_by_key([(folder, "references/…/scores/….parquet"), ...]):
        ...  # keys ascend, also from one table to the next

The work grows with the rows, not with files times rows. A shard whose footer shows that it holds a narrow
range of keys, such as one that `compact` made, is read in place: of each range only the row groups that
overlap it. The rows of all other files are sorted `RUN_BYTES` at a time and written, in blocks, to one
temporary file (in `TMPDIR`; 4 bytes a token, 40 a row); of each range only its blocks are read again.
"""

from __future__ import annotations

import heapq
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.failures import storage_errors
from dpo_cache.store.format.keys import key_halves
from dpo_cache.store.format.shards import cut, keys_of
from dpo_cache.store.upkeep.row_files import ROW_SCHEMA, Group, RowFiles, Source, bytes_of

RANGE_BYTES = 64 * 2**20  # approximate bytes of the rows of one range
RUN_BYTES = 128 * 2**20  # bytes of rows that are sorted at once
BLOCK_BYTES = 64 * 2**10  # smallest read of a run of sorted rows
MOST_OVERLAPPING = 4  # shards that are read in place although their ranges overlap
KEY_SPACE = range(2**64)  # values of a key's first 8 bytes, as a big-endian number


def rows_by_key(
    sources: Sequence[Source], *, only_keys: int = 0, is_hashed: bool = False
) -> Iterator[pa.Table]:
    """Every row of these files, as tables of `ROW_SCHEMA` whose keys ascend throughout; see `RowFiles`.

    Rows of one key are in one table, in the order of their sources. Raises `CorruptShardError` for damage,
    also where a footer claims other keys than its row groups have; `StorageError` where a file cannot be read
    or the temporary file cannot be written. Memory: a few times `RANGE_BYTES`, and 50 bytes for each block.
    """
    blocks = _Blocks()
    with closing(RowFiles(sources, only_keys, is_hashed=is_hashed)) as files, closing(_Runs()) as runs:
        in_place = _choose_in_place(files, len(sources))
        for number in range(len(sources)):
            if number in in_place:
                for group, (bounds, num_bytes) in enumerate(in_place[number]):
                    first, last = key_halves(bounds)[0].tolist()
                    blocks.add(first, last, num_bytes, number, group, 0)
            else:
                for table in files.read_tables(number):
                    runs.add(table, blocks)
        runs.flush(blocks)
        for keys, numbers in blocks.ranges():
            found = (_rows_within(table, keys) for table in _read_blocks(blocks, numbers, files, runs))
            if tables := [table for table in found if len(table)]:
                yield _sorted_rows(tables)


def key_starts(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ascending keys: a mask of the first row of each key, and for each row the position of that first
    row.
    """
    is_first = np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])
    return is_first, np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))


@dataclass(frozen=True)
class Overlap:
    """The files that share completions with another one of them."""

    files: list[int]  # positions
    num_rows: int
    num_keys: int  # distinct


def find_overlap(sources: Sequence[Source], owners: Sequence[int] | None = None) -> Overlap:
    """The files with a key that a file of another owner holds, from their keys. Without `owners`, each file
    is its own; owners must ascend.
    """
    of_source = np.arange(len(sources)) if owners is None else np.asarray(owners)
    is_shared = np.zeros(len(sources), bool)
    num_rows = num_keys = 0
    for table in rows_by_key(sources, only_keys=len(sources)):
        source = table.column("source").to_numpy()
        is_first, first = key_starts(keys_of(table.column("key")))
        has_others = np.zeros(len(source), bool)  # at the first row of each key
        has_others[first[of_source[source] != of_source[source[first]]]] = True
        is_shared[source[has_others[first]]] = True
        num_rows, num_keys = num_rows + len(source), num_keys + int(is_first.sum())
    return Overlap(np.flatnonzero(is_shared).tolist(), num_rows, num_keys)


def _choose_in_place(files: RowFiles, num_files: int) -> dict[int, list[Group]]:
    """The shards to read in place, with their row groups.

    Each row group is read for two ranges at most, on average, and at most `MOST_OVERLAPPING` shards hold keys
    of the same range.
    """
    groups, found, total = dict[int, list[Group]](), list[tuple[int, int, int]](), 0
    for number in range(num_files):
        num_bytes, listed = files.list_groups(number)
        total += num_bytes
        if listed:
            groups[number] = listed
            first, last = key_halves(np.array([listed[0].bounds[0], listed[-1].bounds[1]], "S16"))[0].tolist()
            found.append((first, last, number))
    num_ranges = -(-total // RANGE_BYTES)
    chosen, ends = dict[int, list[Group]](), list[int]()
    for first, last, number in sorted(found):
        while ends and ends[0] < first:
            heapq.heappop(ends)
        is_narrow = (last - first) * num_ranges <= len(groups[number]) * KEY_SPACE.stop
        if is_narrow and len(ends) < MOST_OVERLAPPING:
            heapq.heappush(ends, last)
            chosen[number] = groups[number]
    return chosen


class _Runs:
    """Sorted rows in a temporary file; rows that are still to be sorted are in memory."""

    def __init__(self) -> None:
        self._waiting: list[pa.Table] = []
        self._num_bytes = self._end = 0
        self._place = tempfile.gettempdir()
        # in memory while it is small; `close` closes it
        self._file = tempfile.SpooledTemporaryFile(max_size=RUN_BYTES // 4)  # noqa: SIM115

    def add(self, table: pa.Table, blocks: _Blocks) -> None:
        """Take the rows, and add the blocks that were written for it."""
        self._waiting.append(table)
        self._num_bytes += bytes_of(table)
        if self._num_bytes >= RUN_BYTES:
            self.flush(blocks)

    def flush(self, blocks: _Blocks) -> None:
        """Sort the rows in memory, and write them in blocks."""
        if not self._waiting:
            return
        run = _sorted_rows(self._waiting)
        self._num_bytes = start = 0
        high = key_halves(keys_of(run.column("key")))[0]
        for table in cut(run, BLOCK_BYTES):
            (batch,) = table.to_batches()
            content = batch.serialize()
            with storage_errors("write", self._place):
                self._file.write(content)
            end = start + len(table)
            blocks.add(int(high[start]), int(high[end - 1]), bytes_of(table), -1, self._end, content.size)
            self._end, start = self._end + content.size, end

    def read(self, at: int, num_bytes: int) -> pa.Table:
        """One block."""
        with storage_errors("read", self._place):
            self._file.seek(at)
            content = self._file.read(num_bytes)
        return pa.Table.from_batches([pa.ipc.read_record_batch(pa.py_buffer(content), ROW_SCHEMA)])

    def close(self) -> None:
        self._file.close()


class _Blocks:
    """Sorted rows that are read together. Of their smallest and largest key only the first 8 bytes count."""

    def __init__(self) -> None:
        self.first, self.last = array("Q"), array("Q")
        self.num_bytes = array("q")  # in memory
        self.source = array("q")  # a file that is read in place; -1: the runs' file
        self.at = array("q")  # the row group, or the position in the runs' file
        self.length = array("q")  # in the runs' file

    def add(self, first: int, last: int, num_bytes: int, source: int, at: int, length: int) -> None:
        values = (first, last, num_bytes, source, at, length)
        for column, value in zip(vars(self).values(), values, strict=True):
            column.append(value)

    def ranges(self) -> Iterator[tuple[range, list[int]]]:
        """Ranges of about `RANGE_BYTES` of rows each, with the blocks that overlap them."""
        first, last = (np.array(column, np.uint64) for column in (self.first, self.last))
        order = np.argsort(first, kind="stable")
        bounds = _split_evenly(first[order], np.array(self.num_bytes, np.int64)[order])
        starts = np.searchsorted(first[order], np.array(bounds[:-1], np.uint64))
        before = np.empty(0, np.int64)  # blocks that began in an earlier range
        places = pairwise([*starts.tolist(), len(order)])
        for (low, high), (start, end) in zip(pairwise(bounds), places, strict=True):
            numbers = np.concatenate([before, order[start:end]])
            yield range(low, high), np.sort(numbers).tolist()
            before = numbers[last[numbers] > high - 1]


def _split_evenly(first: np.ndarray, num_bytes: np.ndarray) -> list[int]:
    """Bounds of ranges that hold about `RANGE_BYTES` each of blocks that begin at these keys, ascending."""
    ends = np.cumsum(num_bytes)
    total = int(ends[-1]) if len(ends) else 0
    count = max(1, -(-total // RANGE_BYTES))
    cuts = first[np.searchsorted(ends, [total * place // count for place in range(1, count)])]
    inner = [bound for bound in np.unique(cuts).tolist() if bound > 0]
    return [KEY_SPACE.start, *inner, KEY_SPACE.stop]


def _read_blocks(blocks: _Blocks, numbers: list[int], files: RowFiles, runs: _Runs) -> Iterator[pa.Table]:
    for number in numbers:
        source, at = blocks.source[number], blocks.at[number]
        yield files.read_group(source, at) if source >= 0 else runs.read(at, blocks.length[number])


def _rows_within(table: pa.Table, keys: range) -> pa.Table:
    """The rows whose keys begin in the range."""
    high = key_halves(keys_of(table.column("key")))[0]
    is_within = (high >= keys.start) & (high <= keys.stop - 1)  # 2**64 itself is no uint64
    return table if is_within.all() else table.filter(pa.array(is_within))


def _sorted_rows(tables: list[pa.Table]) -> pa.Table:
    """The rows by key and then by source, in one chunk. The list is emptied, so that no row is held twice."""
    table = pa.concat_tables(tables).combine_chunks()
    tables.clear()
    high, low = key_halves(keys_of(table.column("key")))
    order = np.argsort(high)
    in_order = high[order]
    is_repeated = in_order[1:] == in_order[:-1]
    if is_repeated.any():  # keys that share their first half: mostly, equal keys
        places = np.flatnonzero(np.append(is_repeated, False) | np.append(False, is_repeated))
        tied = order[places]
        source = table.column("source").to_numpy()
        order[places] = tied[np.lexsort((source[tied], low[tied], high[tied]))]
    is_sorted = bool((order[1:] > order[:-1]).all())
    return table if is_sorted else table.take(pa.array(order))
