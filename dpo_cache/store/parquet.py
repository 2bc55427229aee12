"""The Parquet files of the cache: how they are written, and how they are read without trusting them.

A file's name is the sha256 of its bytes. That finds damage, but whoever makes a file can also name it, so
what it holds is checked besides: exact schema, and sizes within the limits below before anything is allocated.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.failures import storage_error
from dpo_cache.store.files import Folder

REMEDY = "The file was changed or damaged.\nDelete it and run the `dpo-cache precompute` that made it again: it scores only what is missing."

HASH_BYTES = 2**20  # read at once while a file is hashed
MOST_OPEN = 64  # files of one index or pair set that are kept open


class ParquetBuilder:
    """A Parquet file in memory, as every file of the cache is: zstd, page checksums, no hidden Arrow schema."""

    def __init__(self, schema: pa.Schema):
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink, schema, compression="zstd", use_dictionary=False, write_page_checksum=True, store_schema=False
        )  # fmt: skip
        self.num_rows = 0

    def add(self, group: pa.Table) -> None:
        """Append the rows as one row group."""
        self._writer.write_table(group, row_group_size=max(1, len(group)))
        self.num_rows += len(group)

    def finish(self) -> bytes:
        """The file."""
        self._writer.close()
        return self._sink.getvalue().to_pybytes()


def write_parquet(table: pa.Table, row_group_size: int) -> bytes:
    """The table as a file of the cache, in row groups of so many rows."""
    builder = ParquetBuilder(table.schema)
    for start in range(0, len(table), max(1, row_group_size)):
        builder.add(table.slice(start, row_group_size))
    return builder.finish()


class ParquetReader:
    """One Parquet file, read row group by row group.

    Opening reads the footer and checks the schema; pages are checked against their checksums as they are read.
    Raises `CorruptShardError` where anything is not as it should be, `StorageError` where the file cannot be read.
    """

    def __init__(self, source: pa.NativeFile, schema: pa.Schema, place: str):
        self._source, self._schema, self.place = source, schema, place
        self._file = open_parquet(source, schema, place)

    @property
    def num_rows(self) -> int:
        return self._file.metadata.num_rows

    @property
    def group_rows(self) -> list[int]:
        """Rows of each row group."""
        return [self._file.metadata.row_group(group).num_rows for group in range(self._file.metadata.num_row_groups)]

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group, or some of its columns."""
        try:
            table = self._file.read_row_group(group, columns=columns, use_threads=False)
            table.validate()
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            raise CorruptShardError(f"{self.place}: row group {group} is not readable ({error}). {REMEDY}") from error
        if len(table) != self._file.metadata.row_group(group).num_rows:
            raise CorruptShardError(f"{self.place}: row group {group} does not have the rows that it promises. {REMEDY}")
        return table

    def close(self) -> None:
        self._file.close()
        self._source.close()


class ParquetReaders:
    """The open files of one folder in the cache, each checked against its name once; few are kept open at a time."""

    def __init__(self, folder: Folder, place: str, schema: pa.Schema):
        self._folder, self._place, self._schema = folder, place, schema
        self._open: OrderedDict[str, ParquetReader] = OrderedDict()

    def open(self, name: str) -> ParquetReader:
        """The file, open; its bytes hash to its name."""
        if name not in self._open:
            self._open[name] = open_verified(self._folder, f"{self._place}/{name}", self._schema)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]


def open_verified(folder: Folder, name: str, schema: pa.Schema) -> ParquetReader:
    """A file of the cache whose bytes hash to its name. What is hashed and what is read afterwards is one open file."""
    place = f"{folder}/{name}"
    source = open_source(folder, name)
    try:
        found = hash_source(source)
    except OSError as error:
        raise storage_error("read", place, error) from error
    check_digest(found, name.rpartition("/")[2], place)
    return ParquetReader(source, schema, place)


def open_source(folder: Folder, name: str) -> pa.NativeFile:
    """The open file, which closes with its last reader."""
    source = folder.open_parquet(name)
    try:
        if not isinstance(source, str):
            return pa.PythonFile(source, "r")
        Path(source).stat()  # Arrow's own error for a file that is gone names no cause
        return pa.OSFile(source)
    except OSError as error:
        raise storage_error("read", f"{folder}/{name}", error) from error


def hash_source(source: pa.NativeFile) -> str:
    """Hex sha256 of an open file's bytes, read piece by piece; leaves it at its start."""
    digest = hashlib.sha256()
    while len(piece := source.read_buffer(HASH_BYTES)):
        digest.update(piece)
    source.seek(0)
    return digest.hexdigest()


def name_by_content(content: bytes) -> str:
    """The file's name: hex sha256 of its bytes."""
    return hashlib.sha256(content).hexdigest() + ".parquet"


def check_content(content: bytes, name: str, place: str) -> None:
    """Raise `CorruptShardError` unless the file's bytes hash to its name."""
    check_digest(hashlib.sha256(content).hexdigest(), name, place)


def check_digest(found: str, name: str, place: str) -> None:
    """Raise `CorruptShardError` unless this digest is the file's name."""
    if f"{found}.parquet" != name:
        raise CorruptShardError(f"{place}: its bytes hash to {found[:12]}…, not to its name. {REMEDY}")


def read_parquet(content: bytes, schema: pa.Schema, place: str) -> pa.Table:
    """The table, if it has exactly this schema; else `CorruptShardError`."""
    reader = ParquetReader(pa.BufferReader(content), schema, place)
    groups = [reader.read_group(group) for group in range(len(reader.group_rows))]
    return pa.concat_tables(groups) if groups else schema.empty_table()


def open_parquet(source: pa.NativeFile, schema: pa.Schema, place: str) -> pq.ParquetFile:
    """An open Parquet file, its schema checked, its pages checked as they are read."""
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True, arrow_extensions_enabled=False)
        found = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptShardError(f"{place}: not readable as Parquet ({error}). {REMEDY}") from error
    if not found.equals(schema):
        raise CorruptShardError(f"{place}: expected the columns\n{schema}\nfound\n{found}")
    return file
