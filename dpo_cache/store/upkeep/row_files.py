"""Score shards and parts of pair sets as rows of one schema, whole or one row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, SIDES
from dpo_cache.store.format.parquet import ParquetReader, ParquetReaders, open_unverified, open_verified
from dpo_cache.store.format.shards import (
    FLOAT_LIST,
    ROW_BYTES,
    SHARD_SCHEMA,
    check_bounds,
    check_scores,
    group_bounds,
    keys_of,
    row_bytes,
)
from dpo_cache.store.upkeep.contents import classify

WORK_BYTES = 2 * ROW_BYTES  # approximate bytes to sort a row without its token log-probs

Source = tuple[Folder, str]  # a score shard, or a part of a pair set: both sides of each pair

ROW_SCHEMA = pa.schema([*SHARD_SCHEMA, pa.field("source", pa.uint32(), nullable=False)])
SHARD_COLUMNS = [SHARD_SCHEMA.names]
PART_COLUMNS = [  # columns of each side, in the order of `SHARD_SCHEMA`
    [f"{side}_key", f"{side}_num_tokens", f"ref_{side}_logps", f"ref_{side}_token_logps"] for side in SIDES
]


class Group(NamedTuple):
    """A row group: its smallest and largest key, S16 `[2]`, and its bytes, as of `bytes_of`."""

    bounds: np.ndarray
    num_bytes: int


class RowFiles:
    """The rows of several files, as tables of `ROW_SCHEMA`; `source` is the position of the row's file.

    Of the first `only_keys` files only the keys are read: their rows have no values, and 0 in the other
    columns. With `is_hashed`, the bytes and values of all others are checked before they are used.
    """

    def __init__(self, sources: Sequence[Source], only_keys: int, *, is_hashed: bool):
        self._sources, self._only_keys, self._is_hashed = sources, only_keys, is_hashed
        self._groups: dict[int, list[Group]] = {}
        self._hashed: dict[tuple[Folder, str], ParquetReaders] = {}  # by folder and place in it
        self._last: tuple[int, ParquetReader] | None = None  # the file of which a row group was read last

    def list_groups(self, number: int) -> tuple[int, list[Group]]:
        """The approximate bytes of a file in memory, and its row groups if it is a shard whose footer says
        that their keys ascend from group to group; else no groups.
        """
        folder, file = self._sources[number]
        if _is_part(file):
            return folder.size(file), []
        with open_unverified(folder, file, SHARD_SCHEMA, is_brief=True) as reader:
            footer = reader.footer
        values = SHARD_SCHEMA.get_field_index("token_logps")
        tokens = [0 if number < self._only_keys else chunks[values].num_values for chunks in footer.chunks]
        sizes = [WORK_BYTES * rows + 4 * count for rows, count in zip(footer.group_rows, tokens, strict=True)]
        bounds = group_bounds(footer)
        if bounds is not None:
            self._groups[number] = list(map(Group, bounds, sizes))
        return sum(sizes), self._groups.get(number, [])

    def read_tables(self, number: int) -> Iterator[pa.Table]:
        """The rows of a file."""
        folder, file = self._sources[number]
        schema, columns = (PAIR_SCHEMA, PART_COLUMNS) if _is_part(file) else (SHARD_SCHEMA, SHARD_COLUMNS)
        if number < self._only_keys:
            columns = [names[:1] for names in columns]
        open_file = open_verified if self._is_checked(number) else open_unverified
        with open_file(folder, file, schema) as reader:
            for table in reader.read_groups([*chain(*columns)]):
                for names in columns:
                    yield self._as_rows(table.select(names), number, reader.place)

    def read_group(self, number: int, group: int) -> pa.Table:
        """The rows of a row group that `list_groups` listed. Raises `CorruptShardError` if it has other keys
        than the footer says.
        """
        reader = self._open(number)
        table = reader.read_group(group, ["key"] if number < self._only_keys else None)
        check_bounds(keys_of(table.column("key")), self._groups[number][group].bounds, reader.place)
        return self._as_rows(table, number, reader.place)

    def close(self) -> None:
        """Close the file of which a row group was read last."""
        if self._last is not None:
            self._last[1].close()
            self._last = None

    def _is_checked(self, number: int) -> bool:
        return self._is_hashed and number >= self._only_keys

    def _open(self, number: int) -> ParquetReader:
        folder, file = self._sources[number]
        if self._is_checked(number):
            place, _, name = file.rpartition("/")
            if (folder, place) not in self._hashed:
                self._hashed[folder, place] = ParquetReaders(folder, place, SHARD_SCHEMA)
            return self._hashed[folder, place].open(name)
        if self._last is None or self._last[0] != number:
            self.close()
            self._last = number, open_unverified(folder, file, SHARD_SCHEMA)
        return self._last[1]

    def _as_rows(self, table: pa.Table, number: int, place: str) -> pa.Table:
        """Columns of a file under the names of `ROW_SCHEMA`."""
        source = pa.array(np.full(len(table), number, np.uint32))
        if number < self._only_keys:
            zeros, no_values = np.zeros(len(table) + 1), pa.array([], pa.float32())
            return pa.table(
                [
                    table.column(0),
                    pa.array(zeros[1:].astype(np.uint32)),
                    pa.array(zeros[1:]),
                    pa.ListArray.from_arrays(pa.array(zeros.astype(np.int32)), no_values, type=FLOAT_LIST),
                    source,
                ],
                schema=ROW_SCHEMA,
            )
        found = pa.table(table.columns, schema=SHARD_SCHEMA)
        if self._is_checked(number):
            check_scores(found, place)
        return pa.table([*found.columns, source], schema=ROW_SCHEMA)


def _is_part(file: str) -> bool:
    return classify(file)[0] == "part"


def bytes_of(table: pa.Table) -> int:
    """Approximate bytes that the rows take in memory while they are sorted."""
    return int(row_bytes(table).sum()) + (WORK_BYTES - ROW_BYTES) * len(table)
