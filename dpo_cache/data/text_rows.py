"""Rows as the text that their source has, without a type for a column: JSON, CSV, lists of dicts.

In an Arrow table with the columns of `SCHEMA`:

    json      string         the row as a JSON object; null if it cannot be read
    problem   string         why it cannot be read; null if it can
    line      int64          line of the file where the row begins, counted from 1; null if there is none
    file      int32          which file, of those in the order they are read
    names     list<string>   in the first row of each block: the columns that no block before has
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

from dpo_cache.data.examples import RowProblem
from dpo_cache.data.json_records import Record, checked_record

SCHEMA = pa.schema(
    [
        ("json", pa.string()),
        ("problem", pa.string()),
        ("line", pa.int64()),
        ("file", pa.int32()),
        ("names", pa.list_(pa.string())),
    ]
)
BLOCK_LETTERS, BLOCK_ROWS = 1 << 23, 4096


class Row(dict[str, Any]):
    """A row; a column that it lacks is None."""

    def __missing__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class TextRows:
    """The rows of a split that were read as text, in a table with the columns of `SCHEMA`.

    Iterating gives each row as a dict of the values that JSON has, or the problem with it.
    """

    table: Dataset
    files: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)  # expected name -> column
    is_untyped: bool = False  # every value is text, also that of a number (CSV)
    known: tuple[str, ...] = ()  # columns of rows before these

    @cached_property
    def column_names(self) -> list[str]:
        """Every column that a row has, in the order in which they come."""
        return renamed_columns(self._own_names, self.rename)

    @property
    def features(self) -> Features:
        """Those of the table: the columns of the rows have no types."""
        return self.table.features

    @property
    def fingerprint(self) -> str:
        return json.dumps([self.table._fingerprint, self.rename])

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Row | RowProblem]:
        for batch in self.table.iter(BLOCK_ROWS):
            yield from self.decode(batch)

    def to_list(self) -> list[Row | RowProblem]:
        return list(self)

    def decode(self, batch: Mapping[str, list[Any]]) -> list[Row | RowProblem]:
        """The rows of a batch of the table."""
        missing = dict.fromkeys(self._own_names)
        return [
            RowProblem(problem)
            if text is None
            else rename_columns(Row(missing | DECODER.decode(text)), self.rename)
            for text, problem in zip(batch["json"], batch["problem"], strict=True)
        ]

    def at(self, first: int, count: int) -> list[Row | RowProblem]:
        """So many rows from the first on, or as many as there are."""
        return self.decode(self.table[first : first + count])

    @cached_property
    def _own_names(self) -> list[str]:
        """Every column that a row has, before it is renamed, in the order in which they come."""
        chunks = self.table.with_format("arrow")["names"].chunks  # only the first row of a block has names
        found = (name for chunk in chunks for name in chunk.flatten().to_pylist())
        return list(dict.fromkeys([*self.known, *found]))

    def head(self, limit: int) -> TextRows:
        return replace(self, table=self.table.select(range(min(limit, len(self.table)))))

    def places(self, rows: Sequence[int], first_row: int = 0) -> list[tuple[str, str]]:
        """For each row, what is counted and its number there, such as ("line", "7").

        `first_row` is the number of the table's first row in the data set.
        """
        found = self.table.select_columns(["line", "file"])[list(rows)]
        return [
            ("number", str(first_row + row))
            if line is None
            else ("line" if len(self.files) < 2 else f"{self.files[file]} line", str(line))
            for row, line, file in zip(rows, found["line"], found["file"], strict=True)
        ]


@dataclass(frozen=True)
class TextStream:
    """The same rows as a stream: blocks of the table, read again in each iteration."""

    blocks: Callable[[], Iterator[pa.RecordBatch]]
    files: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    is_untyped: bool = False
    limit: int | None = None

    column_names = None  # known at the end only

    def __iter__(self) -> Iterator[Row | RowProblem]:
        for window in self.windows(BLOCK_ROWS):
            yield from window

    def windows(self, num_rows: int) -> Iterator[TextRows]:
        """Yield the rows, so many at a time."""
        held: list[pa.RecordBatch] = []
        left = self.limit
        known: dict[str, None] = {}
        for block in self.blocks():
            known.update((name, None) for name in block.column("names").flatten().to_pylist())
            block = block if left is None else block.slice(0, left)
            left = None if left is None else left - len(block)
            held.append(block)
            while sum(map(len, held)) >= num_rows:
                table = pa.Table.from_batches(held)
                yield self._window(table.slice(0, num_rows), known)
                held = table.slice(num_rows).to_batches()
            if left == 0:
                break
        if any(map(len, held)):
            yield self._window(pa.Table.from_batches(held), known)

    def first_block(self) -> TextRows | None:
        """The rows of the first block, whose columns are those of the whole block."""
        block = next(self.blocks(), None)
        return None if block is None else self._window(pa.Table.from_batches([block]))

    def head(self, limit: int) -> TextStream:
        return replace(self, limit=limit)

    def _window(self, table: pa.Table, known: Iterable[str] = ()) -> TextRows:
        rows = Dataset(table, fingerprint=secrets.token_hex(8))
        return TextRows(rows, self.files, self.rename, self.is_untyped, tuple(known))


@dataclass(frozen=True)
class MemoryRows(TextRows):
    """Rows in memory; the table has their numbers, as `index`."""

    take: Callable[[list[int]], list[Mapping[str, Any]]] = field(kw_only=True)  # rows of these numbers
    names: tuple[str, ...] = field(kw_only=True)

    @cached_property
    def column_names(self) -> list[str]:
        return renamed_columns(self.names, self.rename)

    def decode(self, batch: Mapping[str, list[Any]]) -> list[Row | RowProblem]:
        missing = dict.fromkeys(self.names)
        rows = map(_plain_row, self.take(batch["index"]))
        return [
            row if isinstance(row, RowProblem) else rename_columns(Row(missing | row), self.rename)
            for row in rows
        ]

    def places(self, rows: Sequence[int], first_row: int = 0) -> list[tuple[str, str]]:
        return [("number", str(first_row + row)) for row in rows]


def memory_rows(
    take: Callable[[list[int]], list[Mapping[str, Any]]], names: Iterable[str], count: int
) -> MemoryRows:
    """The rows of the numbers from 0 to `count` that `take` gives."""
    table = Dataset(pa.table({"index": pa.array(range(count), pa.int64())}), fingerprint=secrets.token_hex(8))
    return MemoryRows(table, take=take, names=tuple(names))


def rows_in_memory(rows: Sequence[Mapping[str, Any]]) -> MemoryRows:
    """The rows of a list."""
    columns = dict.fromkeys(str(name) for row in rows for name in row)
    return memory_rows(lambda numbers: [rows[number] for number in numbers], columns, len(rows))


def blocks_of(files: Iterable[Iterable[Record]]) -> Iterator[pa.RecordBatch]:
    """Blocks of the table from the records of each file."""
    numbered = ((number, record) for number, records in enumerate(files) for record in records)
    known: dict[str, None] = {}
    while True:
        letters = 0
        rows: list[tuple[str | None, str | None, int | None, int]] = []
        names: dict[str, None] = {}
        for number, record in islice(numbered, BLOCK_ROWS):
            rows.append((record.text, record.problem, record.line, number))
            names.update((name, None) for name in record.names if name not in known)
            letters += len(record.text or "")
            if letters > BLOCK_LETTERS:
                break
        if not rows:
            return
        known.update(names)
        columns = [*zip(*rows, strict=True), [list(names), *([None] * (len(rows) - 1))]]
        yield pa.record_batch(
            [pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)],
            schema=SCHEMA,
        )


def rename_columns(row: Row, rename: Mapping[str, str]) -> Row:
    """The row with the expected names (the keys) in place of its own."""
    if not rename:
        return row
    moved = {new: row[old] for new, old in rename.items()}
    replaced = {*rename, *rename.values()}
    return Row({name: value for name, value in row.items() if name not in replaced} | moved)


def renamed_columns(names: Iterable[str], rename: Mapping[str, str]) -> list[str]:
    """The same of the names of all columns, in their order."""
    names = list(names)
    to_new = {old: new for new, old in rename.items()}
    return [to_new.get(name, name) for name in names if name in to_new or name not in rename]


DECODER = json.JSONDecoder(strict=False)


def _plain_row(row: Mapping[str, Any]) -> Row | RowProblem:
    """The row with lists and dicts in place of tuples, arrays and the like."""
    try:
        text = json.dumps(row)
    except (TypeError, ValueError):
        plain = Row({str(name): _plain(value) for name, value in row.items()})
        record = checked_record(json.dumps(plain, default=str), None)
        return RowProblem(record.problem) if record.problem else plain
    record = checked_record(text, None)
    return RowProblem(record.problem) if record.problem else Row(DECODER.decode(text))


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
