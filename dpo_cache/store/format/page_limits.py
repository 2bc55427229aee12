"""Checks of the memory that reading a Parquet row group needs, before any of it is allocated.

The footer and every page header of the columns to be read are compared with each other and with the limits
below. Both are parsed here: the library that decodes the pages allocates the sizes that they declare, and
some of its accessors end the process on an unknown number. Numbers are those of Apache's `parquet.thrift`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from dpo_cache.store.format.thrift import Struct, parse_struct

FOOTER_BYTES = 256 * 2**10  # at most
GROUP_BYTES = 256 * 2**20  # most bytes of a row group's decoded columns and their levels
FILE_BYTES = 4 * 2**30  # at most
LIST_ITEMS = 4096  # most items of any list in a footer: row groups, columns, encodings
HEADER_BYTES = 512  # most bytes of a page's header

UNCOMPRESSED, ZSTD = 0, 6  # codecs
PLAIN, RLE, BYTE_STREAM_SPLIT = 0, 3, 9  # encodings
DATA_PAGE = 0
PHYSICAL_TYPES = {pa.int64(): 2, pa.uint32(): 1, pa.float32(): 4, pa.float64(): 5}  # other columns: 7, bytes
FIXED_BYTES = 7
REPETITIONS, CONVERTED_TYPES = range(3), range(22)  # the values that Parquet has
LEVEL_BYTES = 4  # bytes of a value's two levels during decoding


class PageError(ValueError):
    """A file or row group that must not be decoded."""


class Chunk(NamedTuple):
    """One column of a row group, as the footer has it."""

    start: int
    packed_bytes: int
    unpacked_bytes: int
    num_values: int


@dataclass(frozen=True)
class Footer:
    """The position of each column, and the rows of each row group."""

    digest: bytes  # hash of the footer's bytes
    group_rows: list[int]
    chunks: list[list[Chunk]]  # by row group and column
    # smallest and largest value of a row group's first column, as the footer claims; None if it has none
    bounds: list[tuple[bytes, bytes] | None]

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)


def read_footer(source: pa.NativeFile, *, has_start: bool = True) -> bytes:
    """The footer's bytes; `PageError` unless the file and its footer have sizes that they may have.

    Without `has_start`, the bytes at the file's start are not read: of a remote file only the end is here.
    """
    size = source.size()
    if not 12 <= size <= FILE_BYTES:
        raise PageError(f"{size} bytes long, expected 12 to {FILE_BYTES}")
    tail = source.read_at(8, size - 8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or (has_start and source.read_at(4, 0) != b"PAR1"):
        raise PageError("no Parquet magic bytes at both ends")
    if length > min(FOOTER_BYTES, size - 12):
        raise PageError(f"its footer claims {length} bytes, expected at most {min(FOOTER_BYTES, size - 12)}")
    return source.read_at(length, size - 8 - length)


def parse_footer(content: bytes, schema: pa.Schema, size: int) -> Footer:
    """The footer of a file of `size` bytes, if its row groups add up and each has the schema's columns inside
    the file.

    Else `PageError` or `ThriftError`.
    """
    fields, _ = parse_struct(content)
    _check_schema([_struct(element) for element in _list(fields, 2)], schema)
    groups = [_struct(group) for group in _list(fields, 4)]
    rows = [_number(group, 3) for group in groups]
    if 0 in rows or sum(rows) != _number(fields, 3):
        raise PageError(f"{_number(fields, 3)} rows promised, {sum(rows)} in its row groups")
    end = size - 8 - len(content)
    chunks = [_chunks(group, schema, end) for group in groups]
    return Footer(hashlib.sha256(content).digest(), rows, chunks, [_bounds(group) for group in groups])


def check_group(
    source: pa.NativeFile, footer: Footer, group: int, schema: pa.Schema, names: list[str]
) -> None:
    """Raise `PageError` unless these columns of a row group can be decoded within `GROUP_BYTES`."""
    chunks = [
        (chunk, field)
        for chunk, field in zip(footer.chunks[group], schema, strict=True)
        if field.name in names
    ]
    total = sum(_decoded_bytes(chunk, field) for chunk, field in chunks)
    if total > GROUP_BYTES:
        raise PageError(f"it would take {total} bytes to read, expected at most {GROUP_BYTES}")
    for chunk, _ in chunks:
        _check_pages(source, chunk)


def _check_schema(elements: list[Struct], schema: pa.Schema) -> None:
    """Raise `PageError` for an element of a kind that Parquet does not have, or a column of another type.

    The library that decodes the pages takes some unknown kinds for others.
    """
    types = [_physical_type(field) for field in schema]
    if [element[1] for element in elements if 1 in element] != types or any(
        element.get(3, 0) not in REPETITIONS or element.get(6, 0) not in CONVERTED_TYPES
        for element in elements
    ):
        raise PageError("a schema with a type that the format does not have")


def _physical_type(field: pa.Field) -> int:
    return PHYSICAL_TYPES.get(value_type(field), FIXED_BYTES)


def _chunks(group: Struct, schema: pa.Schema, end: int) -> list[Chunk]:
    columns = _list(group, 1)
    if len(columns) != len(schema):
        raise PageError(f"a row group of {len(columns)} columns, expected {len(schema)}")
    return [
        _chunk(_struct(column), field, _number(group, 3), end)
        for column, field in zip(columns, schema, strict=True)
    ]


def _chunk(column: Struct, field: pa.Field, num_rows: int, end: int) -> Chunk:
    details = _struct(column.get(3))
    found = Chunk(_number(details, 9), _number(details, 7), _number(details, 6), _number(details, 5))
    is_list = pa.types.is_list(field.type)
    if details.get(1) != _physical_type(field):
        raise PageError(f"column {field.name} is of another type than in the schema")
    if 1 in column or _list(details, 3) != (
        [field.name.encode(), b"list", b"element"] if is_list else [field.name.encode()]
    ):
        raise PageError(f"column {field.name} is not where it should be")
    if (
        details.get(4) not in (UNCOMPRESSED, ZSTD)
        or 11 in details
        or not set(_list(details, 2)) <= {PLAIN, RLE, BYTE_STREAM_SPLIT}
    ):
        raise PageError(
            f"column {field.name} has a codec, a dictionary or an encoding that the format does not have"
        )
    if found.num_values < num_rows or (not is_list and found.num_values != num_rows):
        raise PageError(f"column {field.name} has {found.num_values} values in {num_rows} rows")
    if not 4 <= found.start < found.start + found.packed_bytes <= end:
        raise PageError(f"column {field.name} is outside of the file")
    return found


def _bounds(group: Struct) -> tuple[bytes, bytes] | None:
    """The bounds of the first column's values, from its statistics."""
    statistics = _struct(_struct(_list(group, 1)[0]).get(3)).get(12)
    if not isinstance(statistics, dict):
        return None
    low, high = statistics.get(6), statistics.get(5)
    return (low, high) if isinstance(low, bytes) and isinstance(high, bytes) else None


def _decoded_bytes(chunk: Chunk, field: pa.Field) -> int:
    decoded_bytes = chunk.num_values * value_type(field).byte_width
    return max(decoded_bytes, chunk.unpacked_bytes) + LEVEL_BYTES * chunk.num_values


def value_type(field: pa.Field) -> pa.DataType:
    """The type of a column's values: of a list column, of its elements."""
    return field.type.value_type if pa.types.is_list(field.type) else field.type


def _check_pages(source: pa.NativeFile, chunk: Chunk) -> None:
    """Raise `PageError` unless a column's pages have exactly the values and bytes that the footer has."""
    at, stop = chunk.start, chunk.start + chunk.packed_bytes
    unpacked_bytes = num_values = 0
    while at < stop:
        header, length = parse_struct(source.read_at(min(HEADER_BYTES, stop - at), at))
        page = _struct(header.get(5))
        if header.get(1) != DATA_PAGE or type(header.get(4)) is not int:
            raise PageError("a page that is not a data page with a checksum")
        if page.get(2) not in (PLAIN, BYTE_STREAM_SPLIT) or page.get(3) != RLE or page.get(4) != RLE:
            raise PageError("a page in an encoding that the format does not have")
        at += length + _number(header, 3)
        unpacked_bytes += length + _number(header, 2)
        num_values += _number(page, 1)
    if (at, unpacked_bytes, num_values) != (stop, chunk.unpacked_bytes, chunk.num_values):
        raise PageError("pages that disagree with the footer")


def _number(struct: Struct, field: int) -> int:
    """A count or a size."""
    value = struct.get(field)
    if type(value) is not int or value < 0:
        raise PageError(f"expected a count, found {value!r:.30}")
    return value


def _list(struct: Struct, field: int) -> list:  # type: ignore[type-arg]
    value = struct.get(field)
    if not isinstance(value, list):
        raise PageError("expected a list")
    return value


def _struct(value: object) -> Struct:
    if not isinstance(value, dict):
        raise PageError("expected a struct")
    return value
