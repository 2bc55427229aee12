"""Many shards as few: merged in key order and published anew, in bounded memory.

    for name in write_sorted_shards(folder, place, merge_shards(folder, names)):
        ...  # the new shard, which is durable by now

The format stays the same (`shards.py`): a merged shard is larger, has several row groups, and its keys
ascend, also from one shard to the next. The caller removes the old shards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.failures import storage_errors
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format import shards
from dpo_cache.store.format.keys import is_sorted, key_order
from dpo_cache.store.format.parquet import ParquetBuilder, name_by_content
from dpo_cache.store.format.shards import SHARD_SCHEMA, cut, keys_of, read_keys, read_shard, row_bytes

SHARD_BYTES = 128 * 2**20  # a merged shard; it is held in memory while it is written
RUN_BYTES = 128 * 2**20  # what is sorted in memory at once


def write_sorted_shards(
    folder: Folder, place: str, tables: Iterable[pa.Table], *, shard_bytes: int = SHARD_BYTES
) -> Iterator[str]:
    """Publish tables whose keys ascend, as from `merge_shards`, as shards of about `shard_bytes`.

    Yields the name of each shard when the shard is durable. The same rows give the same files, however they
    were cut into tables, so compacting a compact cache writes nothing new. Holds one shard in memory.
    """
    builder, num_bytes = ParquetBuilder(SHARD_SCHEMA), 0
    for group in regroup(tables, shards.ROW_GROUP_BYTES):
        builder.add(group)
        num_bytes += row_bytes(group).sum()
        if num_bytes >= shard_bytes:
            yield _publish(folder, place, builder)
            builder, num_bytes = ParquetBuilder(SHARD_SCHEMA), 0
    if builder.num_rows:
        yield _publish(folder, place, builder)


def merge_shards(folder: Folder, names: Sequence[str]) -> Iterator[pa.Table]:
    """Every completion of these shards once, as tables of `SHARD_SCHEMA` whose keys ascend throughout.

    Unsorted shards are sorted `RUN_BYTES` at a time and kept in a temporary folder until they are merged;
    sorted shards of more than one row group are read as they are. A key in several shards is taken from one
    of them. Every byte of a shard is checked before its values are used: raises `CorruptShardError`. Memory:
    `RUN_BYTES`, and `ROW_GROUP_BYTES` for each run or sorted shard.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-cache-merge-") as spill:
        yield from merge_sorted(list(_sorted_runs(folder, names, Path(spill))))


def merge_sorted(runs: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """The rows of all runs in key order, each key once, in tables about as large as theirs.

    A run is a stream of tables of `SHARD_SCHEMA` whose keys ascend. One table of each run is held at a time:
    the rows up to the smallest of their last keys are complete, and are yielded. A key of several runs is
    taken from the first.
    """
    heads = [head for run in runs if (head := _Head(run)).advance()]
    while heads:
        bound = min(head.keys[-1] for head in heads)
        ready = [part for head in heads if (part := head.take_until(bound)).num_rows]
        yield sort_table(pa.concat_tables(ready))
        heads = [head for head in heads if head.has_rows or head.advance()]


def sort_table(table: pa.Table) -> pa.Table:
    """The rows in key order, of equal keys only the first."""
    keys = keys_of(table.column("key"))
    order = key_order(keys)
    in_order = keys[order]
    order = order[np.concatenate([[True], in_order[1:] != in_order[:-1]])] if len(order) else order
    return table if np.array_equal(order, np.arange(len(table))) else table.take(pa.array(order))


def regroup(tables: Iterable[pa.Table], most_bytes: int) -> Iterator[pa.Table]:
    """The same rows in the longest tables of at most `most_bytes` each, or of one row."""
    waiting = SHARD_SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        if row_bytes(waiting).sum() > most_bytes:
            *full, waiting = cut(waiting, most_bytes)
            yield from full
    yield from cut(waiting, most_bytes)


class _Head:
    """A run's current table, and how many of its rows are merged."""

    def __init__(self, run: Iterator[pa.Table]):
        self._run = run
        self._table, self.keys, self._taken = SHARD_SCHEMA.empty_table(), np.empty(0, "S16"), 0

    def advance(self) -> bool:
        """Go to the run's next table that has rows; False at its end."""
        for table in self._run:
            if len(table):
                self._table, self.keys, self._taken = table, keys_of(table.column("key")), 0
                return True
        return False

    @property
    def has_rows(self) -> bool:
        return self._taken < len(self.keys)

    def take_until(self, bound: np.bytes_) -> pa.Table:
        """The rows not yet taken whose keys are at most the bound."""
        start, self._taken = self._taken, int(np.searchsorted(self.keys, bound, side="right"))
        return self._table.slice(start, self._taken - start)


def _sorted_runs(folder: Folder, names: Sequence[str], spill: Path) -> Iterator[Iterator[pa.Table]]:
    """Streams of sorted tables that together hold the shards' rows."""
    waiting: list[pa.Table] = []
    num_bytes = 0
    for name in names:
        keys = read_keys(folder, name)
        if len(keys) > 1 and is_sorted(np.concatenate(keys)):
            yield read_shard(folder, name)
            continue
        for table in read_shard(folder, name):
            waiting.append(table)
            num_bytes += row_bytes(table).sum()
            if num_bytes >= RUN_BYTES:
                yield _spill_run(waiting, spill)
                waiting, num_bytes = [], 0
    if waiting:
        yield _spill_run(waiting, spill)


def _spill_run(tables: list[pa.Table], spill: Path) -> Iterator[pa.Table]:
    """Write the tables' rows, sorted, to a new file. Returns the stream that reads it."""
    path = spill / f"{len(list(spill.iterdir()))}.arrow"
    run = sort_table(pa.concat_tables(tables))
    with (
        storage_errors("write", path),
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, SHARD_SCHEMA) as writer,
    ):
        for table in cut(run, shards.ROW_GROUP_BYTES):
            writer.write_table(table.combine_chunks())
    return _read_run(path)


def _read_run(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _publish(folder: Folder, place: str, builder: ParquetBuilder) -> str:
    content = builder.finish()
    name = name_by_content(content)
    folder.publish(f"{place}/{name}", content)
    return name
