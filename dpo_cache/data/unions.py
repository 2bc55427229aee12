"""Nulls that Arrow puts into objects, left out again.

A column of objects has one Arrow type, a struct with the keys of all its objects. So in Parquet, and in any
table made of rows with nested objects, `{"city": "Oslo"}` becomes `{"city": "Oslo", "amount": null}` if
another row has an `amount`. A null that the row itself had looks the same:

    null                                              what is done
    of a message, a content part, a call              left out: it has no meaning there
    of a schema, where JSON Schema allows no null     left out: it must be Arrow's
    in `arguments`, where the tool's schema allows    left out: it must be Arrow's
    no null
    of a key that is null in all rows, in an object   kept and noted: at least one row had it
    without other nulls
    any other in tools, arguments, template options   left out and noted
    in a list                                         kept: Arrow adds none there

Values that are JSON text, or of the type JSON, are never changed; see `json_nulls.py`. An empty
object is one with all members null, which Arrow distinguishes from null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset

from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.fields import is_null
from dpo_cache.data.json_nulls import IN_JSON, has_odd_nulls
from dpo_cache.data.schemas import (
    BELOW,
    CALL,
    MESSAGE,
    NAMES,
    NEVER_NULL,
    SCHEMA,
    VALUE,
    allows_null,
    property_schema,
    tool_schemas,
)
from dpo_cache.data.text_rows import MemoryRows

Row = dict[str, Any]
Shape: TypeAlias = "dict[str, Shape] | list[Shape] | bool"

UNKNOWN = "nulls in its tools or tool calls, which Arrow does not distinguish from absent keys,"
LEFT_OUT = f"{UNKNOWN} are left out (text of JSON keeps them)"
KEPT = f"{UNKNOWN} are kept"

PLACES = {"tools": SCHEMA, "functions": SCHEMA, "chat_template_kwargs": VALUE}  # by column; else `MESSAGE`


@dataclass(frozen=True)
class Nested:
    """The columns of a table whose objects may have nulls from Arrow that matter."""

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    keeps_nulls: bool = False  # nothing shows that the nulls are Arrow's


def parse_nested_row(
    row: Row, nested: Nested, data_format: str, ranked_pairs: str = "all"
) -> Example | RowProblem:
    """The result of `parse_row` for a row of a table with these nested columns."""
    row, notes = without_union_nulls(row, nested)
    example = parse_row(row, data_format, ranked_pairs)
    if not nested.shapes and isinstance(example, Example) and has_odd_nulls(example):
        notes = (IN_JSON,)
    if not notes or isinstance(example, RowProblem) or example.is_text:
        return example
    return replace(example, notes=(*example.notes, *notes))


def nested_columns(rows: object) -> Nested:
    """The nested columns of a `Dataset`, by its Arrow types, or of rows in memory, by their values.

    Rows in memory may come from Arrow (`Dataset.to_list`, `pandas.read_parquet`) if all objects in one place
    have the same keys. They do if a property or an argument is null that can have no null, or if pandas holds
    lists as arrays; else their nulls are kept and noted. JSON has no nulls from Arrow.
    """
    if isinstance(rows, Dataset):
        return nested_fields(rows.features.arrow_schema)
    return _nested_in_memory(rows) if isinstance(rows, MemoryRows) else Nested()


def nested_fields(schema: pa.Schema) -> Nested:
    """The nested columns of a table with these Arrow types."""
    return Nested(_that_matter({column.name: _shape(column.type) for column in schema}))


def without_union_nulls(row: Row, nested: Nested) -> tuple[Row, tuple[str, ...]]:
    """The row without Arrow's nulls in its nested columns, and notes; see the module's docstring."""
    if not nested.shapes:
        return row, ()
    cleaner = _Cleaner(row, keeps_nulls=nested.keeps_nulls)
    cleaned = cleaner.clean_columns(nested.shapes)
    return type(row)({**row, **cleaned}), tuple(note for note in (LEFT_OUT, KEPT) if note in cleaner.notes)


def _that_matter(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes of the columns with objects in objects, and of those that are no messages."""
    return {name: shape for name, shape in shapes.items() if _depth(shape) > (name not in PLACES)}


def _nested_in_memory(rows: MemoryRows) -> Nested:
    shapes: dict[str, Shape] = {}
    mixed = set()
    for row in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            if isinstance(value, (list, dict)) and name not in mixed:
                try:
                    shapes[name] = _merged(shapes.get(name, True), value)
                except _MixedKeysError:
                    mixed.add(name)
    shapes = _that_matter({name: shape for name, shape in shapes.items() if name not in mixed})
    if not shapes:
        return Nested()
    (first,) = rows.take([0])
    has_arrays = any(hasattr(value, "tolist") and value.ndim for value in first.values())
    return Nested(shapes, keeps_nulls=not has_arrays and not _has_null_of_arrow(rows, shapes))


def _has_null_of_arrow(rows: MemoryRows, shapes: Mapping[str, Shape]) -> bool:
    for row in rows:
        if isinstance(row, dict):
            cleaner = _Cleaner(row, keeps_nulls=True)
            cleaner.clean_columns(shapes)
            if cleaner.has_null_of_arrow:
                return True
    return False


class _MixedKeysError(Exception):
    """Two objects in the same place differ in their keys, so they do not come from Arrow."""


def _merged(shape: Shape, value: Any) -> Shape:
    """The shape of earlier values and of this one. Raises `_MixedKeysError`."""
    if is_null(value):
        return shape
    if isinstance(value, list):
        if not (shape is True or isinstance(shape, list)):
            raise _MixedKeysError
        inner = shape[0] if isinstance(shape, list) else True
        for entry in value:
            inner = _merged(inner, entry)
        return [inner]
    if isinstance(value, dict):
        earlier = dict.fromkeys(value, True) if shape is True else shape
        if not isinstance(earlier, dict) or earlier.keys() != value.keys():
            raise _MixedKeysError
        return {key: _merged(earlier[key], member) for key, member in value.items()}
    if not isinstance(shape, bool):
        raise _MixedKeysError
    return False


def _shape(kind: pa.DataType) -> Shape:
    """A dict from key to shape for objects, a list of one shape for lists, else whether it is only null."""
    if pa.types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return {field.name: _shape(field.type) for field in fields}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_shape(kind.value_type)]
    return bool(pa.types.is_null(kind))


def _depth(shape: Shape) -> int:
    """The number of objects within each other."""
    if isinstance(shape, list):
        return _depth(shape[0])
    return 1 + max(map(_depth, shape.values()), default=0) if isinstance(shape, dict) else 0


class _Cleaner:
    """Cleans the values of one row and gathers the notes on it."""

    def __init__(self, row: Row, *, keeps_nulls: bool = False) -> None:
        self.notes: set[str] = set()
        self.has_null_of_arrow = False  # where the row itself can have none
        self._row, self._keeps_nulls = row, keeps_nulls

    def clean_columns(self, shapes: Mapping[str, Shape]) -> Row:
        """The columns of these shapes without Arrow's nulls."""
        return {
            name: self.clean(self._row[name], shape, PLACES.get(name, MESSAGE), None)
            for name, shape in shapes.items()
            if self._row.get(name) is not None
        }

    def clean(self, value: Any, shape: Shape, place: str, schema: Any) -> Any:
        """The value without Arrow's nulls. `schema` describes it if it is part of `arguments`."""
        if isinstance(value, list) and isinstance(shape, list):
            items = schema.get("items") if isinstance(schema, dict) else None
            return [entry if entry is None else self.clean(entry, shape[0], place, items) for entry in value]
        if not isinstance(value, dict) or not isinstance(shape, dict):
            return value
        if place == CALL and isinstance(value.get("name"), str):
            schema = self._schemas.get(value["name"])
        nulls = {key for key, member in value.items() if is_null(member)}
        has_only_own = self._keeps_nulls or all(shape[key] is True for key in nulls)
        cleaned = {}
        for key, member in value.items():
            if key not in nulls:
                below = BELOW.get(place, {}).get(key, SCHEMA if place == NAMES else place)
                inner = schema if place == CALL else property_schema(schema, key)
                cleaned[key] = self.clean(member, shape[key], below, inner)
                continue
            may_be_own = _may_be_own(key, place, schema)
            self.has_null_of_arrow |= not may_be_own and place in (NAMES, VALUE)
            if has_only_own and (may_be_own or place in (SCHEMA, NAMES)):
                cleaned[key] = None
                self.notes.add(KEPT)
            elif may_be_own:
                self.notes.add(LEFT_OUT)
        return cleaned

    @cached_property
    def _schemas(self) -> dict[str, Any]:
        """The schemas of functions' arguments, from the column `tools`."""
        return dict(tool_schemas(self._row.get("tools")))


def _may_be_own(key: str, place: str, schema: Any) -> bool:
    """Return whether the row itself may have had this null, in a place where it means something."""
    if place == SCHEMA:
        return key not in NEVER_NULL
    if place != VALUE:
        return False
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return True
    return properties.get(key) is not None and allows_null(properties[key])
