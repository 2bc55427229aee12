"""Many shards as few: merged in key order and published anew, in bounded memory.

    names = shards to merge
    for shard in write_sorted_shards(folder, place, merge_shards(folder, place, names)):
        ...  # the new shard's name; it is durable when it is handed out

What a shard holds does not change (`shards.py`): a merged one is larger, has several row groups, and its keys
ascend, also from one shard to the next. The old shards are left alone; to remove them is the caller's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.failures import storage_error
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format import shards
from dpo_cache.store.format.keys import is_sorted, key_order
from dpo_cache.store.format.parquet import ParquetBuilder, name_by_content
from dpo_cache.store.format.shards import (
    SHARD_SCHEMA,
    cut,
    keys_of,
    open_shard,
    read_keys,
    read_shard,
    table_bytes,
)

SHARD_BYTES = 128 * 2**20  # a merged shard; it is held in memory while it is written
RUN_BYTES = 128 * 2**20  # what is sorted in memory at once


def write_sorted_shards(
    folder: Folder, place: str, tables: Iterable[pa.Table], *, shard_bytes: int = SHARD_BYTES
) -> Iterator[str]:
    """Publish tables whose keys ascend (as `merge_shards` gives them) as shards of about `shard_bytes`; their
    names, one by one.

    Each shard is durable when its name is handed out. The same rows give the same files, however they were
    cut into tables: to compact what is compact writes nothing new. Holds one shard in memory.
    """
    builder, num_bytes = ParquetBuilder(SHARD_SCHEMA), 0
    for group in regroup(tables, shards.ROW_GROUP_BYTES):
        builder.add(group)
        num_bytes += table_bytes(group)
        if num_bytes >= shard_bytes:
            yield _publish(folder, place, builder)
            builder, num_bytes = ParquetBuilder(SHARD_SCHEMA), 0
    if builder.num_rows:
        yield _publish(folder, place, builder)


def merge_shards(
    folder: Folder, place: str, names: Sequence[str], *, scratch: Path | None = None
) -> Iterator[pa.Table]:
    """Every completion of these shards once, as tables of `SHARD_SCHEMA` whose keys ascend throughout.

    Shards in any order of keys are sorted `RUN_BYTES` at a time and kept in a temporary folder inside
    `scratch` (the system's, unless given) until they are merged; sorted shards of more than one row group are
    read as they are. A key in several shards is taken from one of them. Every byte is checked before a value
    of its shard is
    used: raises `CorruptShardError`. Memory: `RUN_BYTES`, and `ROW_GROUP_BYTES` for each run or sorted shard.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-cache-merge-", dir=scratch) as spill:
        yield from merge_sorted(list(_sorted_runs(folder, place, names, Path(spill))))


def merge_sorted(runs: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """The rows of all runs in key order, each key once, in tables about as large as theirs.

    A run is a stream of tables of `SHARD_SCHEMA` whose keys ascend. One table of each run is held at a time:
    what is at most the smallest of their last keys is complete, and is handed on. A key of several runs is
    taken from the first.
    """
    heads = [head for run in runs if (head := _Head(run)).advance()]
    while heads:
        bound = min(head.last_key for head in heads)
        ready = [part for head in heads if (part := head.take_until(bound)).num_rows]
        yield sort_table(pa.concat_tables(ready))
        heads = [head for head in heads if head.has_rows or head.advance()]


def sort_table(table: pa.Table) -> pa.Table:
    """The rows in key order, the first of each key alone."""
    keys = keys_of(table.column("key"))
    order = key_order(keys)
    in_order = keys[order]
    order = order[np.concatenate([[True], in_order[1:] != in_order[:-1]])] if len(order) else order
    return table if np.array_equal(order, np.arange(len(table))) else table.take(pa.array(order))


def regroup(tables: Iterable[pa.Table], most_bytes: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most `most_bytes` (one row at least), each as long as it can be."""
    waiting = SHARD_SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        if table_bytes(waiting) > most_bytes:
            *full, waiting = cut(waiting, most_bytes)
            yield from full
    if len(waiting):
        yield from cut(waiting, most_bytes)


class _Head:
    """The table of a run that the merge has come to, and how far."""

    def __init__(self, run: Iterator[pa.Table]):
        self._run = run
        self._table, self._keys, self._taken = SHARD_SCHEMA.empty_table(), np.empty(0, "S16"), 0

    def advance(self) -> bool:
        """Go to the run's next table that has rows; False at its end."""
        for table in self._run:
            if len(table):
                self._table, self._keys, self._taken = table, keys_of(table.column("key")), 0
                return True
        return False

    @property
    def has_rows(self) -> bool:
        return self._taken < len(self._keys)

    @property
    def last_key(self) -> np.bytes_:
        return self._keys[-1]

    def take_until(self, bound: np.bytes_) -> pa.Table:
        """The rows not yet taken whose keys are at most the bound."""
        start, self._taken = self._taken, int(np.searchsorted(self._keys, bound, side="right"))
        return self._table.slice(start, self._taken - start)


def _sorted_runs(
    folder: Folder, place: str, names: Sequence[str], spill: Path
) -> Iterator[Iterator[pa.Table]]:
    """Streams of sorted tables that together hold the shards' rows."""
    waiting: list[pa.Table] = []
    num_bytes = 0
    for name in names:
        if _is_large_and_sorted(folder, place, name):
            yield read_shard(folder, place, name)
            continue
        for table in read_shard(folder, place, name):
            waiting.append(table)
            num_bytes += table_bytes(table)
            if num_bytes >= RUN_BYTES:
                yield _spill_run(waiting, spill)
                waiting, num_bytes = [], 0
    if waiting:
        yield _spill_run(waiting, spill)


def _is_large_and_sorted(folder: Folder, place: str, name: str) -> bool:
    reader = open_shard(folder, place, name)
    try:
        return len(reader.group_rows) > 1 and is_sorted(np.concatenate(list(read_keys(reader))))
    finally:
        reader.close()


def _spill_run(tables: list[pa.Table], spill: Path) -> Iterator[pa.Table]:
    """The tables' rows, sorted, in a file of their own; the stream that reads it."""
    path = spill / f"{len(list(spill.iterdir()))}.arrow"
    run = sort_table(pa.concat_tables(tables))
    try:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SHARD_SCHEMA) as writer:
            for table in cut(run, shards.ROW_GROUP_BYTES):
                writer.write_table(table.combine_chunks())
    except OSError as error:
        raise storage_error("write", path, error) from error
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
