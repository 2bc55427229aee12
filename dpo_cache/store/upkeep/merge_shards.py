"""Merge many shards into few, in key order and in bounded memory.

    for name in write_sorted_shards(folder, place, merge_shards(folder, names)):
        ...  # the new shard, which is durable by now

The format stays the same (`shards.py`): a merged shard is larger, has several row groups, and its keys
ascend, also from one shard to the next. The caller removes the old shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format import shards
from dpo_cache.store.format.parquet import ParquetBuilder, name_by_content
from dpo_cache.store.format.shards import SHARD_SCHEMA, cut, keys_of, row_bytes
from dpo_cache.store.upkeep.key_ranges import key_starts, rows_by_key

SHARD_BYTES = 128 * 2**20  # a merged shard; it is held in memory while it is written


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

    A key in several shards is taken from the first of them. Every byte of a shard is checked before its
    values are used: raises `CorruptShardError`. Memory and temporary file: those of `rows_by_key`.
    """
    for table in rows_by_key([(folder, name) for name in names], is_hashed=True):
        is_first, _ = key_starts(keys_of(table.column("key")))
        rows = table.select(SHARD_SCHEMA.names)
        yield rows if is_first.all() else rows.filter(pa.array(is_first))


def regroup(tables: Iterable[pa.Table], most_bytes: int) -> Iterator[pa.Table]:
    """The same rows in the longest tables of at most `most_bytes` each, or of one row."""
    waiting = SHARD_SCHEMA.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        if row_bytes(waiting).sum() > most_bytes:
            *full, waiting = cut(waiting, most_bytes)
            yield from full
    yield from cut(waiting, most_bytes)


def _publish(folder: Folder, place: str, builder: ParquetBuilder) -> str:
    content = builder.finish()
    name = name_by_content(content)
    folder.publish(f"{place}/{name}", content)
    return name
