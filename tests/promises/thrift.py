"""Parquet's footers and page headers, taken apart and put together again as someone hostile would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12


@dataclass
class Value:
    """A value of Thrift's compact protocol: its kind, and what it holds. Fields of a struct by number, items
    of a list in order.
    """

    kind: int
    held: Any

    def __getitem__(self, number: int) -> Value:
        return self.held[number]

    def __setitem__(self, number: int, value: Value) -> None:
        self.held[number] = value


def read_struct(content: bytes, at: int) -> tuple[Value, int]:
    fields: dict[int, Value] = {}
    number = 0
    while kind := content[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _read_integer(content, at)
        fields[number], at = _read_value(content, at, kind & 15)
    return Value(STRUCT, dict(sorted(fields.items()))), at + 1


def write_struct(value: Value) -> bytes:
    out, before = b"", 0
    for number, field in sorted(value.held.items()):
        step = number - before
        out += (
            bytes([step << 4 | field.kind]) if 0 < step < 16 else bytes([field.kind]) + _write_integer(number)
        )
        out += write_value(field)
        before = number
    return out + b"\0"


def write_value(value: Value) -> bytes:
    if value.kind in (1, 2):
        return b""
    if value.kind == 3:
        return bytes([value.held & 255])
    if value.kind in (4, 5, 6):
        return _write_integer(value.held)
    if value.kind == BINARY:
        return write_varint(len(value.held)) + value.held
    if value.kind == LIST:
        kind, items = value.held
        head = (
            bytes([len(items) << 4 | kind])
            if len(items) < 15
            else bytes([0xF0 | kind]) + write_varint(len(items))
        )
        return head + b"".join(map(write_value, items))
    if value.kind == STRUCT:
        return write_struct(value)
    return value.held  # as it is, whatever it says


def write_varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def edit_footer(content: bytes, change: Callable[[Value], None]) -> bytes:
    """The file with another footer."""
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer, _ = read_struct(content, start)
    change(footer)
    written = write_struct(footer)
    return content[:start] + written + len(written).to_bytes(4, "little") + b"PAR1"


def edit_last_page(content: bytes, change: Callable[[Value], None], body: bytes | None = None) -> bytes:
    """The file with another header (and body) of the last page, which is the last column's only one; the
    footer agrees with it.
    """
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer, _ = read_struct(content, start)
    column = footer[4].held[1][-1][1].held[1][-1][3]
    at = column[9].held
    header, body_at = read_struct(content, at)
    old = header[2].held + body_at - at
    if body is None:
        body = content[body_at:start]
    change(header)
    page = write_struct(header)
    column[6].held += header[2].held + len(page) - old
    column[7].held = len(page) + len(body)
    written = write_struct(footer)
    return content[:at] + page + body + written + len(written).to_bytes(4, "little") + b"PAR1"


def _read_value(content: bytes, at: int, kind: int) -> tuple[Value, int]:
    if kind in (1, 2):
        return Value(kind, None), at
    if kind == 3:
        return Value(kind, content[at]), at + 1
    if kind in (4, 5, 6):
        number, at = _read_integer(content, at)
        return Value(kind, number), at
    if kind == BINARY:
        length, at = _read_varint(content, at)
        return Value(kind, content[at : at + length]), at + length
    if kind == LIST:
        length, kind_of_items, at = content[at] >> 4, content[at] & 15, at + 1
        if length == 15:
            length, at = _read_varint(content, at)
        items = []
        for _ in range(length):
            item, at = _read_value(content, at, kind_of_items)
            items.append(item)
        return Value(LIST, (kind_of_items, items)), at
    if kind == STRUCT:
        return read_struct(content, at)
    raise ValueError(kind)


def _read_integer(content: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while content[at] & 0x80:
        value |= (content[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | content[at] << shift, at + 1


def _write_integer(number: int) -> bytes:
    return write_varint((number << 1 ^ number >> 63) & 2**64 - 1)
