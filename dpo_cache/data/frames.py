"""Rows of a pandas frame.

pandas has no whole number next to a null, so in a struct that Arrow made for several rows, 5 is 5.0. Where a
member of objects is null in some row, and each of its numbers is a whole float, the numbers are read as
whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset

from dpo_cache.data.fields import is_null
from dpo_cache.data.text_rows import MemoryRows, memory_rows

Path = tuple[str, ...]  # the column, and the names of members in it; elements of lists have the list's path


def rows_of_frame(frame: Any) -> Dataset | MemoryRows:
    """The rows as a table, unless a column holds objects other than text, whose types may differ from row to
    row.
    """
    from pandas.api.types import infer_dtype, is_object_dtype

    frame = frame.set_axis(list(map(str, frame.columns)), axis=1)
    columns = [frame.iloc[:, place] for place in range(frame.shape[1])]
    objects = [one for one in columns if is_object_dtype(one) and infer_dtype(one) not in ("string", "empty")]
    if not objects:
        return Dataset.from_pandas(frame, preserve_index=False)
    whole = whole_members((str(one.name), value) for one in objects for value in one)

    def take(numbers: list[int]) -> list[Mapping[str, Any]]:
        found = frame.iloc[numbers]
        missing = found.isna().to_numpy()
        return [
            {
                name: None if is_missing else with_whole_numbers(value, (name,), whole) if whole else value
                for (name, value), is_missing in zip(row.items(), gone, strict=True)
            }
            for row, gone in zip(found.to_dict("records"), missing, strict=True)
        ]

    return memory_rows(take, frame.columns, len(frame))


def whole_members(cells: Iterable[tuple[str, Any]]) -> set[Path]:
    """The members of objects that are null somewhere and otherwise floats without a fraction.

    `cells` are the columns' names and values.
    """
    has_null, is_whole = set[Path](), dict[Path, bool]()
    for name, cell in cells:
        for path, value in _members(cell, (name,)):
            if is_null(value):
                has_null.add(path)
            elif is_whole.get(path, True):
                is_whole[path] = isinstance(value, float) and value.is_integer()
    return {path for path in has_null if is_whole.get(path, False)}


def with_whole_numbers(value: Any, path: Path, whole: set[Path]) -> Any:
    """The value with whole numbers as the members of these paths."""
    if isinstance(value, Mapping):
        return {name: with_whole_numbers(one, (*path, str(name)), whole) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_whole_numbers(one, path, whole) for one in value]
    if _is_list(value) and value.dtype == object:  # stays an array, as a sign that it comes from Arrow
        found = value.copy()
        for place, one in enumerate(value):
            found[place] = with_whole_numbers(one, path, whole)
        return found
    return int(value) if isinstance(value, float) and path in whole and not is_null(value) else value


def _members(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Each value in an object that is neither an object nor a list, and its path."""
    if isinstance(value, Mapping):
        for name, member in value.items():
            if isinstance(member, Mapping) or _is_list(member):
                yield from _members(member, (*path, str(name)))
            else:
                yield (*path, str(name)), member
    elif _is_list(value):
        for one in value:
            yield from _members(one, path)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or bool(getattr(value, "ndim", 0))
