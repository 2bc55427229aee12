"""The Parquet files of the cache: how they are written, and how they are read without trusting them.

A file's name is the sha256 of its bytes. That finds damage, but whoever makes a file can also name it, so
what it holds is checked besides: exact schema, and sizes within the limits below before anything is allocated.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.failures import storage_error
from dpo_cache.store.files import Folder
from dpo_cache.store.pages import FILE_BYTES, FOOTER_BYTES, LIST_ITEMS, PageError, check_footer, check_group, check_tail

REMEDY = "The file was changed or damaged.\nDelete it and run the `dpo-cache precompute` that made it again: it scores only what is missing."

DAMAGE = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError)  # what reading a bad file may raise, in Arrow and in `pages.py`
FILE_NAME = re.compile(r"[0-9a-f]{64}\.parquet")
HASH_BYTES = 2**20  # read at once while a file is hashed
MOST_OPEN = 64  # files of one index or pair set that are kept open


class ParquetBuilder:
    """A Parquet file in memory, as every file of the cache is: zstd, page checksums, no hidden Arrow schema."""

    def __init__(self, schema: pa.Schema):
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink, schema, compression="zstd", use_dictionary=False, write_page_checksum=True, store_schema=False,
            column_encoding=float_encodings(schema),
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


def float_encodings(schema: pa.Schema) -> dict[str, str]:
    """Floats byte by byte, all first bytes together: zstd then takes 8 % less, and reading is faster."""
    kinds = {field.name: field.type.value_type if pa.types.is_list(field.type) else field.type for field in schema}
    paths = {field.name: f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema}
    return {paths[name]: "BYTE_STREAM_SPLIT" for name, kind in kinds.items() if pa.types.is_floating(kind)}


def write_parquet(table: pa.Table, row_group_size: int) -> bytes:
    """The table as a file of the cache, in row groups of so many rows."""
    builder = ParquetBuilder(table.schema)
    for start in range(0, len(table), max(1, row_group_size)):
        builder.add(table.slice(start, row_group_size))
    return builder.finish()


class ParquetReader:
    """One Parquet file, read row group by row group.

    Opening reads the footer and checks the schema. What a row group would take is checked before it is read
    (`pages.py`), and its pages against their checksums. Raises `CorruptShardError` where anything is not as it should be.
    """

    def __init__(self, source: pa.NativeFile, schema: pa.Schema, place: str, footer: pq.FileMetaData | None = None):
        self._source, self._schema, self.place = source, schema, place
        self._file = open_parquet(source, schema, place, footer)
        self.footer = self._file.metadata
        self.group_rows = [self.footer.row_group(group).num_rows for group in range(self.footer.num_row_groups)]

    @property
    def num_rows(self) -> int:
        return self.footer.num_rows

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group, or some of its columns."""
        names = list(columns or self._schema.names)
        try:
            check_group(self._source, self.footer, group, self._schema, names)
            table = self._file.read_row_group(group, columns=names, use_threads=False)
            table.validate(full=True)
        except DAMAGE as error:
            raise CorruptShardError(f"{self.place}: row group {group} is not readable ({error}). {REMEDY}") from error
        if len(table) != self.group_rows[group]:
            raise CorruptShardError(f"{self.place}: row group {group} does not have the rows that it promises. {REMEDY}")
        return table

    def close(self) -> None:
        self._file.close()
        self._source.close()


class ParquetReaders:
    """The files of one folder in the cache, each hashed when it is first opened; few are kept open at a time."""

    def __init__(self, folder: Folder, place: str, schema: pa.Schema):
        self._folder, self._place, self._schema = folder, place, schema
        self._open: OrderedDict[str, ParquetReader] = OrderedDict()
        self._footers: dict[str, pq.FileMetaData] = {}  # of the bytes that were hashed: a file is opened again by them

    def open(self, name: str) -> ParquetReader:
        """The file, open; its bytes hash to its name."""
        if name not in self._open:
            self._open[name] = self._open_again(name) if name in self._footers else self._open_first(name)
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]

    def _open_first(self, name: str) -> ParquetReader:
        reader = open_verified(self._folder, f"{self._place}/{name}", self._schema)
        self._footers[name] = reader.footer
        return reader

    def _open_again(self, name: str) -> ParquetReader:
        place = f"{self._place}/{name}"
        return ParquetReader(open_source(self._folder, place), self._schema, f"{self._folder}/{place}", self._footers[name])


def open_verified(folder: Folder, name: str, schema: pa.Schema) -> ParquetReader:
    """A file of the cache whose bytes hash to its name. What is hashed and what is read afterwards is one open file."""
    place = f"{folder}/{name}"
    source = open_source(folder, name)
    try:
        check_size(source.size(), place)
        found = hash_source(source)
    except OSError as error:
        raise storage_error("read", place, error) from error
    check_digest(found, name.rpartition("/")[2], place)
    return ParquetReader(source, schema, place)


def check_size(num_bytes: int, place: str) -> None:
    """Raise `CorruptShardError` for a file larger than any of the cache."""
    if num_bytes > FILE_BYTES:
        raise CorruptShardError(f"{place}: {num_bytes} bytes long, expected at most {FILE_BYTES}. {REMEDY}")


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


def open_parquet(source: pa.NativeFile, schema: pa.Schema, place: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """An open Parquet file, its footer and schema checked, its pages checked as they are read."""
    try:
        check_tail(source)
        file = pq.ParquetFile(
            source, metadata=footer, page_checksum_verification=True, arrow_extensions_enabled=False,
            thrift_string_size_limit=FOOTER_BYTES, thrift_container_size_limit=LIST_ITEMS,
        )  # fmt: skip
        found = file.schema_arrow
    except DAMAGE as error:
        raise CorruptShardError(f"{place}: not readable as Parquet ({error}). {REMEDY}") from error
    if not found.equals(schema):
        raise CorruptShardError(f"{place}: expected the columns\n{schema}\nfound\n{found}")
    try:
        check_footer(file.metadata, schema)
    except PageError as error:
        raise CorruptShardError(f"{place}: {error}. {REMEDY}") from error
    return file
