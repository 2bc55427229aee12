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

Values that are JSON text, or of the type JSON, are never changed. An empty object is one with all members
null; Arrow tells it from null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset

from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.fields import is_null
from dpo_cache.data.serialized import parse_json

Row = dict[str, Any]
Shape: TypeAlias = "dict[str, Shape] | list[Shape] | bool"

LEFT_OUT = "nulls in its tools or tool calls, which Arrow does not tell from absent keys, are left out"
KEPT = "nulls in its tools or tool calls, which Arrow does not tell from absent keys, are kept"

# Where a value is. Members of `NAMES` are schemas by name; of `VALUE`, anything.
MESSAGE, CALL, SCHEMA, NAMES, VALUE = "message", "call", "schema", "names", "value"
PLACES = {"tools": SCHEMA, "functions": SCHEMA, "chat_template_kwargs": VALUE}  # of columns; else `MESSAGE`
BELOW = {
    MESSAGE: {"tool_calls": CALL, "function_call": CALL, "tools": SCHEMA, "functions": SCHEMA},
    CALL: {"arguments": VALUE, "parameters": VALUE},
    SCHEMA: {
        **dict.fromkeys(
            ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), NAMES
        ),
        **dict.fromkeys(("default", "const", "example", "examples"), VALUE),
    },
}
# Keys of a tool or a JSON schema whose value is never null
NEVER_NULL = {
    "type", "function", "name", "description", "parameters", "properties", "patternProperties", "$defs",
    "definitions", "dependentSchemas", "items", "prefixItems", "required", "enum", "title", "format",
    "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength",
    "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "multipleOf", "anyOf", "oneOf",
    "allOf", "not", "if", "then", "else", "additionalProperties", "$ref", "examples",
}  # fmt: skip


def parse_arrow_row(
    row: Row, shapes: Mapping[str, Shape], data_format: str, ranked_pairs: str = "all"
) -> Example | RowProblem:
    """The result of `parse_row` for a row of a table whose `nested_columns` are these."""
    if not shapes:
        return parse_row(row, data_format, ranked_pairs)
    row, notes = without_union_nulls(row, shapes)
    example = parse_row(row, data_format, ranked_pairs)
    if not notes or isinstance(example, RowProblem) or example.is_text:
        return example
    return replace(example, notes=(*example.notes, *notes))


def nested_columns(rows: object) -> dict[str, Shape]:
    """The `nested_fields` of a `Dataset`; none for rows that have no Arrow types."""
    return nested_fields(rows.features.arrow_schema) if isinstance(rows, Dataset) else {}


def nested_fields(schema: pa.Schema) -> dict[str, Shape]:
    """The shapes of the columns whose objects may have nulls from Arrow that matter.

    Messages whose members are all plain values are not among them.
    """
    shapes = {field.name: _shape(field.type) for field in schema}
    return {name: shape for name, shape in shapes.items() if _depth(shape) > (name not in PLACES)}


def without_union_nulls(row: Row, shapes: Mapping[str, Shape]) -> tuple[Row, tuple[str, ...]]:
    """The row without Arrow's nulls in the columns of these shapes, and notes; see the module's docstring."""
    cleaner = _Cleaner(row)
    cleaned = {
        name: cleaner.clean(row[name], shape, PLACES.get(name, MESSAGE), None)
        for name, shape in shapes.items()
        if row.get(name) is not None
    }
    return type(row)({**row, **cleaned}), tuple(note for note in (LEFT_OUT, KEPT) if note in cleaner.notes)


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

    def __init__(self, row: Row) -> None:
        self.notes: set[str] = set()
        self._row = row

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
        has_only_own = all(shape[key] is True for key in nulls)
        cleaned = {}
        for key, member in value.items():
            if key not in nulls:
                below = BELOW.get(place, {}).get(key, SCHEMA if place == NAMES else place)
                inner = schema if place == CALL else _property(schema, key)
                cleaned[key] = self.clean(member, shape[key], below, inner)
            elif has_only_own and (place in (SCHEMA, NAMES) or _may_be_own(key, place, schema)):
                cleaned[key] = None
                self.notes.add(KEPT)
            elif _may_be_own(key, place, schema):
                self.notes.add(LEFT_OUT)
        return cleaned

    @cached_property
    def _schemas(self) -> dict[str, Any]:
        """The schemas of functions' arguments, from the column `tools`."""
        return dict(_tool_schemas(self._row.get("tools")))


def _may_be_own(key: str, place: str, schema: Any) -> bool:
    """Whether the row itself may have had this null, in a place where it means something."""
    if place == SCHEMA:
        return key not in NEVER_NULL
    if place != VALUE:
        return False
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not any(properties.values()):
        return True
    return properties.get(key) is not None and _allows_null(properties[key])


def _property(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties.get(key) if isinstance(properties, dict) else None


def _allows_null(schema: Any) -> bool:
    """Whether a JSON schema allows null. Its own nulls may be Arrow's."""
    if not isinstance(schema, dict) or schema.get("nullable"):
        return True
    options = [option for key in ("anyOf", "oneOf") for option in schema.get(key) or ()]
    if options:
        return any(_allows_null(option) for option in options)
    kinds = schema.get("type")
    return kinds is None or kinds == "null" or (isinstance(kinds, list) and "null" in kinds)


def _tool_schemas(tools: Any) -> Iterator[tuple[str, Any]]:
    """Name and parameters of each tool, as far as they can be read."""
    if isinstance(tools, str):
        tools = parse_json(tools)
    for tool in tools if isinstance(tools, list) else [tools]:
        if isinstance(tool, str):
            tool = parse_json(tool)
        function = tool.get("function") if isinstance(tool, dict) else None
        found = function if isinstance(function, dict) else tool
        if isinstance(found, dict) and isinstance(found.get("name"), str):
            parameters = found.get("parameters")
            yield found["name"], parse_json(parameters) if isinstance(parameters, str) else parameters
