"""What a Parquet row group would take to read, found out before anything is allocated for it.

The footer and every page header of the columns to be read are compared with each other and with the limits
below. A page header is read here, since the library that decodes the pages allocates what it promises.
The layout of both is that of Apache Parquet (`parquet.thrift`, Thrift's compact protocol).
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FOOTER_BYTES = 256 * 2**10  # at most
GROUP_BYTES = 256 * 2**20  # of the decoded columns of a row group, and of their levels, at most
FILE_BYTES = 4 * 2**30  # at most
LIST_ITEMS = 4096  # of any list in a footer, at most: row groups, columns, encodings
HEADER_BYTES = 512  # of a page, at most

CODECS = {"ZSTD", "UNCOMPRESSED"}
LEVEL_BYTES = 4  # of a value's two levels, while it is decoded
DATA_PAGE, PLAIN, RLE, BYTE_STREAM_SPLIT = 0, 0, 3, 9  # numbers of parquet.thrift


class PageError(ValueError):
    """A row group that must not be decoded."""


def check_tail(source: pa.NativeFile) -> None:
    """Raise `PageError` unless the file ends in a footer of a size that can be parsed, and is no larger than a file may be."""
    size = source.size()
    if not 12 <= size <= FILE_BYTES:
        raise PageError(f"{size} bytes long, expected 12 to {FILE_BYTES}")
    tail = source.read_at(8, size - 8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or source.read_at(4, 0) != b"PAR1":
        raise PageError("no Parquet magic bytes at both ends")
    if length > min(FOOTER_BYTES, size - 12):
        raise PageError(f"its footer claims {length} bytes, expected at most {min(FOOTER_BYTES, size - 12)}")


def check_footer(footer: pq.FileMetaData, schema: pa.Schema) -> None:
    """Raise `PageError` unless the footer's row groups add up and each has the schema's columns."""
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if min(rows, default=1) < 1 or sum(rows) != footer.num_rows:
        raise PageError(f"{footer.num_rows} rows promised, {sum(rows)} in its row groups")
    if footer.num_columns != len(schema) or any(
        footer.row_group(group).num_columns != len(schema) for group in range(footer.num_row_groups)
    ):  # fmt: skip
        raise PageError(f"a row group without its {len(schema)} columns")


def check_group(source: pa.NativeFile, footer: pq.FileMetaData, group: int, schema: pa.Schema, columns: list[str]) -> None:
    """Raise `PageError` unless these columns of a row group can be decoded within `GROUP_BYTES`."""
    row_group = footer.row_group(group)
    total = 0
    for position, field in enumerate(schema):
        if field.name in columns:
            total += _decoded_bytes(row_group.column(position), field, row_group.num_rows)
    if total > GROUP_BYTES:
        raise PageError(f"it would take {total} bytes to read, expected at most {GROUP_BYTES}")
    end = source.size() - 8
    for position, field in enumerate(schema):
        if field.name in columns:
            _check_pages(source, row_group.column(position), end)


def _decoded_bytes(column: Any, field: pa.Field, num_rows: int) -> int:
    """Bytes to decode a column chunk, by what the footer says of it."""
    is_list = pa.types.is_list(field.type)
    value = field.type.value_type if is_list else field.type
    if column.path_in_schema.partition(".")[0] != field.name or column.file_path:
        raise PageError(f"column {field.name} is not where it should be")
    if column.compression not in CODECS or column.has_dictionary_page:
        raise PageError(f"column {field.name} is neither zstd nor plain bytes, or has a dictionary")
    if column.num_values < num_rows or (not is_list and column.num_values != num_rows):
        raise PageError(f"column {field.name} has {column.num_values} values in {num_rows} rows")
    if min(column.total_compressed_size, column.total_uncompressed_size, column.data_page_offset) < 0:
        raise PageError(f"column {field.name} has a negative size")
    return max(column.num_values * value.byte_width, column.total_uncompressed_size) + LEVEL_BYTES * column.num_values


def _check_pages(source: pa.NativeFile, column: Any, end: int) -> None:
    """Raise `PageError` unless the pages of a column chunk are exactly what the footer says of them together."""
    at, stop = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    if not 4 <= at < stop <= end:
        raise PageError("a column outside of the file")
    num_values = num_bytes = 0
    while at < stop:
        header, length = parse_struct(source.read_at(min(HEADER_BYTES, stop - at), at))
        page = header.get(5)
        if header.get(1) != DATA_PAGE or not isinstance(page, dict) or not {1, 2, 3, 4} <= page.keys() or not isinstance(header.get(4), int):
            raise PageError("a page that is no data page with a checksum")
        if page[2] not in (PLAIN, BYTE_STREAM_SPLIT) or page[3] != RLE or page[4] != RLE:
            raise PageError("a page in an encoding that the format does not have")
        packed, unpacked = header.get(3), header.get(2)
        if not isinstance(packed, int) or not isinstance(unpacked, int) or not isinstance(page[1], int) or min(packed, unpacked, page[1]) < 0:
            raise PageError("a page without a size")
        at += length + packed
        num_bytes += length + unpacked
        num_values += page[1]
    if (at, num_bytes, num_values) != (stop, column.total_uncompressed_size, column.num_values):
        raise PageError("pages that disagree with the footer")


# -- Thrift's compact protocol -------------------------------------------------------------------------

_TRUE, _FALSE, _BINARY, _STRUCT = 1, 2, 8, 12
_INTEGERS = (4, 5, 6)
_DEEPEST = 4  # a page header, its kind, its statistics


def parse_struct(content: bytes, start: int = 0, depth: int = 1) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and where it ends. Raises `PageError` for what a page header does not have."""
    fields: dict[int, Any] = {}
    at, number = start, 0
    try:
        while kind := content[at]:
            at += 1
            if kind >> 4:
                number += kind >> 4
            else:
                number, at = _zigzag(content, at)
            fields[number], at = _parse_value(content, at, kind & 15, depth)
    except IndexError:
        raise PageError("a page header that is cut off or too long") from None
    return fields, at + 1


def _parse_value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in _INTEGERS:
        return _zigzag(content, at)
    if kind == _BINARY:
        length, at = _varint(content, at)
        content[at + length]  # the struct goes on behind it: IndexError where it is cut off
        return content[at : at + length], at + length
    if kind == _STRUCT and depth < _DEEPEST:
        return parse_struct(content, at, depth + 1)
    raise PageError("a page header with a value that none has")


def _zigzag(content: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while content[at] & 0x80:
        value |= (content[at] & 0x7F) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise PageError("a page header with a number beyond 64 bits")
    return value | content[at] << shift, at + 1
