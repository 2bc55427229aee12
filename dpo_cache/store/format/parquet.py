"""The Parquet files of the cache: how they are written, and how they are read without trusting them.

A file's name is the sha256 of its bytes. That finds damage, but whoever makes a file can also name it, so
what it holds is checked besides: exact schema, and sizes within the limits below before anything is
allocated.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.folders.failures import raise_refusal, storage_error
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.page_limits import (
    FILE_BYTES,
    FOOTER_BYTES,
    LIST_ITEMS,
    Footer,
    check_group,
    parse_footer,
    read_footer,
)

REMEDY = (
    "The file was changed or damaged.\n"
    "Delete it and run the `dpo-cache precompute` that made it again: it scores only what is missing."
)

# what reading a bad file may raise, in Arrow and in `pages.py`
DAMAGE = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError)
HASH_BYTES = 2**20  # read at once while a file is hashed
MOST_OPEN = 64  # files of one index or pair set that are kept open


class ParquetBuilder:
    """A Parquet file in memory, as every file of the cache is: zstd, page checksums, no hidden Arrow
    schema.
    """

    def __init__(self, schema: pa.Schema):
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink, schema, compression="zstd", use_dictionary=False, write_page_checksum=True,
            store_schema=False,
            column_encoding=float_encodings(schema),
            # key or row; those of lists make the footer twice as long and help nobody
            write_statistics=schema.names[:1],
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
    kinds = {
        field.name: field.type.value_type if pa.types.is_list(field.type) else field.type for field in schema
    }
    paths = {
        field.name: f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
    }
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
    (`pages.py`), and its pages against their checksums. Raises `CorruptShardError` where anything is not as
    it should be.
    """

    def __init__(self, source: pa.NativeFile, schema: pa.Schema, place: str):
        self._source, self._schema, self.place = source, schema, place
        self.footer, self._file = open_parquet(source, schema, place)

    @property
    def num_rows(self) -> int:
        return sum(self.footer.group_rows)

    @property
    def group_rows(self) -> list[int]:
        """Rows of each row group."""
        return self.footer.group_rows

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group, or some of its columns."""
        names = list(columns or self._schema.names)
        try:
            check_group(self._source, self.footer, group, self._schema, names)
            table = self._file.read_row_group(group, columns=names, use_threads=False)
            table.validate(full=True)
        except DAMAGE as error:
            raise_refusal(self.place, error)
            raise CorruptShardError(
                f"{self.place}: row group {group} is not readable ({error}). {REMEDY}"
            ) from error
        if len(table) != self.group_rows[group]:
            raise CorruptShardError(
                f"{self.place}: row group {group} does not have the rows that it promises. {REMEDY}"
            )
        return table

    def close(self) -> None:
        self._file.close()
        self._source.close()


class ParquetReaders:
    """The files of one folder in the cache, each hashed when it is first opened; few are kept open at a
    time.
    """

    def __init__(self, folder: Folder, place: str, schema: pa.Schema):
        self._folder, self._place, self._schema = folder, place, schema
        self._open: OrderedDict[str, ParquetReader] = OrderedDict()
        self._hashed: dict[str, bytes] = {}  # digest of the footer of each file that was hashed
        self._held: dict[str, pa.NativeFile] = {}

    def keep_open(self, names: Sequence[str]) -> None:
        """Open these files now, and keep them open: an open file outlives its name."""
        self._held = {name: open_source(self._folder, f"{self._place}/{name}") for name in names}

    def open(self, name: str) -> ParquetReader:
        """The file, open; its bytes hash to its name."""
        if name not in self._open:
            self._open[name] = self._open_file(name)
            if len(self._open) > MOST_OPEN and not self._held:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]

    def _open_file(self, name: str) -> ParquetReader:
        place = f"{self._place}/{name}"
        if name in self._held:
            return open_verified(self._folder, place, self._schema, self._held[name])
        # as before, if its footer is: the pages that this leads to have checksums of their own
        if name in self._hashed:
            reader = ParquetReader(open_source(self._folder, place), self._schema, f"{self._folder}/{place}")
            if reader.footer.digest == self._hashed[name]:
                return reader
            reader.close()
        reader = open_verified(self._folder, place, self._schema)
        self._hashed[name] = reader.footer.digest
        return reader


def open_verified(
    folder: Folder, name: str, schema: pa.Schema, source: pa.NativeFile | None = None
) -> ParquetReader:
    """A file of the cache, or one that is open already, whose bytes hash to its name. What is hashed and what
    is read is one open file.
    """
    place = f"{folder}/{name}"
    source = source or open_source(folder, name)
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
    return source if isinstance(source, pa.NativeFile) else pa.PythonFile(source, "r")


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


def open_parquet(source: pa.NativeFile, schema: pa.Schema, place: str) -> tuple[Footer, pq.ParquetFile]:
    """An open Parquet file, its footer and schema checked, its pages checked as they are read."""
    try:
        content = read_footer(source)
        file = pq.ParquetFile(
            source, page_checksum_verification=True, arrow_extensions_enabled=False,
            thrift_string_size_limit=FOOTER_BYTES, thrift_container_size_limit=LIST_ITEMS,
        )  # fmt: skip
        found = file.schema_arrow
    except DAMAGE as error:
        raise_refusal(place, error)
        raise CorruptShardError(f"{place}: not readable as Parquet ({error}). {REMEDY}") from error
    if not found.equals(schema):
        raise CorruptShardError(f"{place}: expected the columns\n{schema}\nfound\n{found}")
    try:
        return parse_footer(content, schema, source.size()), file
    except DAMAGE as error:
        raise_refusal(place, error)
        raise CorruptShardError(f"{place}: its footer is damaged ({error}). {REMEDY}") from error
