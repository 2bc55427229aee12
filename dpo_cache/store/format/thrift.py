"""A reader of Thrift's compact protocol, as far as Parquet's footers and page headers use it.

The input is not trusted: the size of the result is bounded by the bytes that are read, and no length is used
before it is checked.
"""

from __future__ import annotations

from typing import Any

Struct = dict[int, Any]  # values by field number: int, bool, bytes, list, or another Struct

_TRUE, _FALSE, _BYTE, _BINARY, _LIST, _STRUCT = 1, 2, 3, 8, 9, 12
_INTEGERS = frozenset((4, 5, 6))
_DEEPEST = 8  # structs in structs; Parquet's own go to six


class ThriftError(ValueError):
    """Bytes that are no struct, or one that Parquet does not have."""


def parse_struct(content: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct that starts there, and where it ends."""
    try:
        return _struct(content, at, 1)
    except IndexError:
        raise ThriftError("cut off, or too long") from None


def _struct(content: bytes, at: int, depth: int) -> tuple[Struct, int]:
    if depth > _DEEPEST:
        raise ThriftError("nested too deep")
    fields: Struct = {}
    number = 0
    while kind := content[at]:
        at += 1
        if kind > 15:
            number += kind >> 4
        else:
            number, at = _integer(content, at)
        kind &= 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], at = _value(content, at, kind, depth)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(content, at)
    if kind == _BINARY:
        length, at = _varint(content, at)
        content[at + length]  # a struct continues after it: IndexError where the content ends before
        return content[at : at + length], at + length
    if kind == _STRUCT:
        return _struct(content, at, depth + 1)
    if kind == _LIST:
        return _list(content, at, depth)
    if kind == _BYTE:
        return content[at], at + 1
    raise ThriftError(f"a value of kind {kind}, which Parquet does not have")


def _list(content: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    length, kind = content[at] >> 4, content[at] & 15
    at += 1
    if length == 15:
        length, at = _varint(content, at)
    if kind == _LIST or length > len(content) - at:
        raise ThriftError("a list in a list, or of more items than there are bytes")
    items = []
    for _ in range(length):
        item, at = (
            (content[at] == _TRUE, at + 1) if kind in (_TRUE, _FALSE) else _value(content, at, kind, depth)
        )
        items.append(item)
    return items, at


def _integer(content: bytes, at: int) -> tuple[int, int]:
    byte = content[at]
    if byte < 128:
        return (byte >> 1) ^ -(byte & 1), at + 1
    value, at = _varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := content[at]) > 127:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise ThriftError("a number beyond 64 bits")
    return value | byte << shift, at + 1
