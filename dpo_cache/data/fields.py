"""Fields of a row: text, blanks, and the reason why one cannot be used."""

from __future__ import annotations

from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

# Kinds of values in words; the first that fits counts
WORDS: dict[tuple[type, ...], str] = {
    (str,): "text",
    (bool,): "true or false",
    (int, float, Decimal): "a number",
    (list, tuple): "a list",
    (dict,): "an object",
    (date,): "a date",  # also with a time
    (time,): "a time",
    (timedelta,): "a length of time",
    (bytes, bytearray): "bytes",
}


class BadRow(Exception):
    """A row cannot be used; the message completes 'row 7: ...'."""


def is_null(value: Any) -> bool:
    """Return whether a value is null, which pandas also writes as NaN."""
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: Any) -> bool:
    """Return whether a field is missing, or text of nothing but spaces."""
    return (not value or value.isspace()) if isinstance(value, str) else is_null(value)


def objects_of_lists(value: Any) -> list[dict[str, Any]] | None:
    """The objects of an object of lists of one length, as `Sequence` of `datasets` makes them; None for any
    other value.
    """
    if not isinstance(value, dict) or not all(isinstance(entry, list) for entry in value.values()):
        return None
    if len({len(entry) for entry in value.values()}) != 1:
        return None
    return [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]


def describe(value: Any) -> str:
    """A description of a field's value for an error message: `missing` for a missing value or NaN."""
    if is_null(value):
        return "missing"
    words = (words for kinds, words in WORDS.items() if isinstance(value, kinds))
    return next(words, f"a value of type {type(value).__name__}")


def read_text(row: dict[str, Any], name: str) -> str:
    """The text of a field. Raises `BadRow` for anything else, and for a blank."""
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is {describe(value)}, expected text")
    if is_blank(value):
        raise BadRow(f"`{name}` is empty")
    return value
