"""The Parquet files of the cache: how they are written, and how they are read without trusting them.

A file's name is the sha256 of its bytes. That finds damage, but whoever makes a file can also name it, so
what it holds is checked besides: exact schema, and sizes within the limits below before anything is
allocated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cache.errors import CorruptShardError
from dpo_cache.log import log_remark
from dpo_cache.store.folders.failures import storage_error, storage_errors
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.folders.local_copies import hash_source
from dpo_cache.store.folders.ranges import Range, RangeFile
from dpo_cache.store.format.documents import digest_bytes
from dpo_cache.store.format.page_limits import (
    FILE_BYTES,
    FOOTER_BYTES,
    LIST_ITEMS,
    check_group,
    parse_footer,
    read_footer,
    value_type,
)

REMEDY = (
    "The file was changed or damaged.\n"
    "Delete it and run the `dpo-cache precompute` that made it again: it scores only what is missing."
)

# Arrow and `page_limits.py` raise one of these on a bad file
DAMAGE = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError)
Load = Callable[[Sequence[Range]], None]
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
            column_encoding=_float_encodings(schema),
            # key or row only: statistics of lists double the footer's length, and no reader uses them
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


def _float_encodings(schema: pa.Schema) -> dict[str, str]:
    """Floats byte by byte, all first bytes together: zstd then takes 8 % less, and reading is faster."""
    return {
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name: "BYTE_STREAM_SPLIT"
        for field in schema
        if pa.types.is_floating(value_type(field))
    }


def write_parquet(table: pa.Table, row_group_size: int) -> bytes:
    """The table as a file of the cache, in row groups of so many rows."""
    builder = ParquetBuilder(table.schema)
    for start in range(0, len(table), max(1, row_group_size)):
        builder.add(table.slice(start, row_group_size))
    return builder.finish()


class ParquetReader:
    """One Parquet file, read row group by row group. `with` closes it.

    Opening reads the footer and checks the schema. The memory that a row group needs is checked before it is
    read (`page_limits.py`), and its pages against their checksums. Raises `CorruptShardError` for any damage.
    """

    def __init__(self, source: pa.NativeFile, schema: pa.Schema, place: str, load: Load | None = None):
        """`load` requests the ranges that are read next, of a file that has only its end here."""
        self._source, self._schema, self.place, self._load = source, schema, place, load
        with _damage_raised(place, "not readable as Parquet"):
            footer = read_footer(source, has_start=load is None)
            self._file = pq.ParquetFile(
                source, page_checksum_verification=True, arrow_extensions_enabled=False,
                thrift_string_size_limit=FOOTER_BYTES, thrift_container_size_limit=LIST_ITEMS,
            )  # fmt: skip
            found = self._file.schema_arrow
        if not found.equals(schema):
            raise CorruptShardError(f"{place}: expected the columns\n{schema}\nfound\n{found}")
        with _damage_raised(place, "its footer is damaged"):
            self.footer = parse_footer(footer, schema, source.size())

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One row group, or some of its columns."""
        names = list(columns or self._schema.names)
        if self._load:
            chunks = zip(self.footer.chunks[group], self._schema.names, strict=True)
            self._load(
                [(chunk.start, chunk.start + chunk.packed_bytes) for chunk, name in chunks if name in names]
            )
        with _damage_raised(self.place, f"row group {group} is not readable"):
            check_group(self._source, self.footer, group, self._schema, names)
            table = self._file.read_row_group(group, columns=names, use_threads=False)
            table.validate(full=True)
        if len(table) != self.footer.group_rows[group]:
            raise CorruptShardError(
                f"{self.place}: row group {group} does not have the rows that it promises. {REMEDY}"
            )
        return table

    def read_groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Every row group, or some of its columns, one at a time."""
        for group in range(len(self.footer.group_rows)):
            yield self.read_group(group, columns)

    def close(self) -> None:
        self._file.close()
        self._source.close()

    def __enter__(self) -> ParquetReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ParquetReaders:
    """The files of one folder in the cache, each hashed when it is first opened; few are kept open at a
    time.

    Of a remote folder, a file without a local copy is open only until the next one is opened. Opened again,
    it is read by ranges.
    """

    def __init__(self, folder: Folder, place: str, schema: pa.Schema):
        self._folder, self._place, self._schema = folder, place, schema
        self._open: OrderedDict[str, ParquetReader] = OrderedDict()
        self._hashed: dict[str, bytes] = {}  # digest of the footer of each file that was hashed
        self._held: dict[str, pa.NativeFile] = {}  # files that `keep_open` opened
        self._unkept: str | None = None  # the open file of which there is no local copy

    def keep_open(self, names: Sequence[str]) -> None:
        """Open these files now, and keep them open: an open file outlives its name.

        Of a remote folder, those for whose local copies there is no room are only looked for.
        """
        places = [f"{self._place}/{name}" for name in names]
        opened = self._folder.each(self._folder.open_pinned, places)
        self._held = {name: file for name, file in zip(names, opened, strict=True) if file is not None}
        if missing := len(names) - len(self._held):
            log_remark(
                f"{self._folder}/{self._place}: there is no room for local copies of {missing} of "
                f"{len(names)} files, so these are read from the store repeatedly. "
                "DPO_CACHE_PARTS_GB is the limit."
            )

    def open(self, name: str) -> ParquetReader:
        """The file, open; its bytes hash to its name."""
        if name not in self._open:
            if self._unkept is not None and self._unkept in self._open:
                self._open.pop(self._unkept).close()
            self._open[name] = self._open_file(name)
            closable = [other for other in self._open if other not in self._held]
            if len(closable) > MOST_OPEN:
                self._open.pop(closable[0]).close()
        self._open.move_to_end(name)
        return self._open[name]

    def _open_file(self, name: str) -> ParquetReader:
        place = f"{self._place}/{name}"
        if name in self._held:
            return open_verified(self._folder, place, self._schema, _native(self._held[name]))
        # as before, if its footer is: the pages that this leads to have checksums of their own
        if name in self._hashed:
            reader = open_unverified(self._folder, place, self._schema)
            if reader.footer.digest == self._hashed[name]:
                return reader
            reader.close()
        reader = open_verified(self._folder, place, self._schema)
        self._hashed[name] = reader.footer.digest
        self._unkept = None if self._folder.keeps(place) else name
        return reader


def open_unverified(folder: Folder, name: str, schema: pa.Schema, *, is_brief: bool = False) -> ParquetReader:
    """A file of the cache whose bytes are not hashed: for its keys, or for comparing; with `is_brief` only
    for its footer. Of a remote file, only the columns are read that are needed.
    """
    source = folder.open_ranges(name, is_brief=is_brief)
    load = source.load if isinstance(source, RangeFile) else None
    return ParquetReader(_native(source), schema, f"{folder}/{name}", load)


def open_verified(
    folder: Folder, name: str, schema: pa.Schema, source: pa.NativeFile | None = None
) -> ParquetReader:
    """A file of the cache, or one that is open already, whose bytes hash to its name.

    The same open file is hashed and then read.
    """
    place = f"{folder}/{name}"
    source = source or _native(folder.open_parquet(name))
    with storage_errors("read", place):
        num_bytes = source.size()
        if num_bytes > FILE_BYTES:
            raise CorruptShardError(
                f"{place}: {num_bytes} bytes long, expected at most {FILE_BYTES}. {REMEDY}"
            )
        found = hash_source(source)
    _check_digest(found, name, place)
    return ParquetReader(source, schema, place)


def _native(source: Any) -> pa.NativeFile:
    """The open file, which closes with its last reader."""
    return source if isinstance(source, pa.NativeFile) else pa.PythonFile(source, "r")


def name_by_content(content: bytes) -> str:
    """The file's name: hex sha256 of its bytes."""
    return digest_bytes(content) + ".parquet"


def check_content(content: bytes, name: str, place: str) -> None:
    """Raise `CorruptShardError` unless the file's bytes hash to its name; `name` may be its whole path."""
    _check_digest(digest_bytes(content), name, place)


def _check_digest(found: str, name: str, place: str) -> None:
    if f"{found}.parquet" != name.rpartition("/")[2]:
        raise CorruptShardError(f"{place}: its bytes hash to {found[:12]}…, not to its name. {REMEDY}")


@contextmanager
def _damage_raised(place: str, problem: str) -> Iterator[None]:
    """Raise `CorruptShardError` for damage that reading meets in the block, `StorageError` for a refusal."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno:  # the file system refused: damage has no errno
            raise storage_error("read", place, error) from error
        raise CorruptShardError(f"{place}: {problem} ({error}). {REMEDY}") from error
