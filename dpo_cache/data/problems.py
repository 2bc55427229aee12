"""Rows that cannot be used, named for an error or a remark: by reason, with their lines or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from datasets import Dataset

from dpo_cache.data.text_rows import TextRows

Problem = tuple[int, str]  # the row's number in the table, and the reason
ROWS_SHOWN = 5


def problems_by_reason(
    problems: Sequence[Problem], rows: Dataset | TextRows, first_row: int = 0
) -> list[str]:
    """A sentence part for each reason, the most frequent first: its rows are counted, and the first named.

    `first_row` is the number of the table's first row in the data set.
    """
    by_reason: dict[str, list[int]] = {}
    for row, reason in problems:
        by_reason.setdefault(reason, []).append(row)
    return [
        f"{reason}: {_counted(len(found))}, {_named(found, rows, first_row)}"
        for reason, found in sorted(by_reason.items(), key=lambda entry: -len(entry[1]))
    ]


def unusable_rows(
    problems: Sequence[Problem],
    rows: Dataset | TextRows,
    *,
    place: str,
    data_format: str,
    verb: str = "used",
    remedy: str = "Correct or remove them and run again.",
    first_row: int = 0,
) -> str:
    """The message of the error for rows that cannot be used."""
    lines = "".join(f"  {line}\n" for line in problems_by_reason(problems, rows, first_row))
    counted = "rows are counted from 0, " if ", number " in lines else ""
    found = f"{_counted(len(problems))} cannot be {verb} ({counted}format {data_format})"
    return f"{place}: {found}:\n{lines}{remedy}"


def _counted(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _named(found: Sequence[int], rows: Dataset | TextRows, first_row: int) -> str:
    """`line 2, 5, …` or `a.jsonl line 2, 5, b.jsonl line 7`, or row numbers: `number 1, 4`."""
    first = found[:ROWS_SHOWN]
    places = (
        rows.places(first, first_row)
        if isinstance(rows, TextRows)
        else [("number", str(first_row + row)) for row in first]
    )
    groups = groupby(places, key=lambda place: place[0])
    shown = ", ".join(f"{kind} {', '.join(number for _, number in group)}" for kind, group in groups)
    return shown + (", …" if len(found) > ROWS_SHOWN else "")
