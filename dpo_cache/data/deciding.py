"""The row by which the format of a data set is decided."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.formats import detect_format, has_all_parts
from dpo_cache.data.read import Rows, first_row, reading
from dpo_cache.data.text_rows import TextRows, TextStream
from dpo_cache.errors import DataError

ROWS_READ = 100


def deciding_row(rows: Rows, place: str, data_format: str | None = None) -> dict[str, Any]:
    """The first row that is no wrong one in its format, or in that given: rows with nulls do not decide.

    Among the first rows, one that has a value in each column that a format needs comes before others; where
    none can be used, it is the first of all. Raises `DataError` if no row can be read.
    """
    first = first_row(rows, place)
    columns = list(rows.column_names or first)
    usable: dict[str, Any] | None = None
    for row in chain([first], _first_rows(rows, place)):
        if _is_usable(row, columns, data_format):
            if has_all_parts(row, columns):
                return row
            usable = usable or row
    return usable or first


def _first_rows(rows: Rows, place: str) -> Iterator[dict[str, Any]]:
    if isinstance(rows, TextStream):
        block = rows.first_block()
        found: Iterator[Any] = iter([] if block is None else block.at(0, ROWS_READ))
    elif isinstance(rows, TextRows):
        found = iter(rows.at(0, ROWS_READ))
    else:
        found = islice(iter(rows), ROWS_READ)
    with reading(place):
        yield from (row for row in found if not isinstance(row, RowProblem))


def _is_usable(row: dict[str, Any], columns: list[str], data_format: str | None) -> bool:
    row = {**dict.fromkeys(columns), **row}
    try:
        return isinstance(parse_row(row, data_format or detect_format(columns, row)), Example)
    except DataError:
        return False
