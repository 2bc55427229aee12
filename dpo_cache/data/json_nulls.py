"""Nulls in the tools and tool calls of JSON rows.

pandas and `datasets` write Arrow's nulls into JSON, too: one for each key that only other rows have. Nothing
distinguishes them from a row's own, so all are kept. Rows with one that no schema explains are noted.
"""

from __future__ import annotations

from typing import Any

from dpo_cache.data.examples import Example
from dpo_cache.data.fields import is_null
from dpo_cache.data.schemas import (
    BELOW,
    NAMES,
    NEVER_NULL,
    SCHEMA,
    VALUE,
    allows_null,
    property_schema,
    tool_schemas,
)

IN_JSON = (
    "nulls in its tools or tool calls are kept as they are (a file that pandas or `datasets` wrote as JSON "
    "has one for each key of other rows)"
)


def has_odd_nulls(example: Example) -> bool:
    """Return whether tools have a null where no schema has one, or arguments have one that their schema does
    not allow. Without a schema, any null is odd.
    """
    if example.is_text:
        return False
    tools = example.template_options.get("tools") or ()
    if tools and _is_odd_in_schema(tools, SCHEMA):
        return True
    calls = [
        call["function"]
        for part in (example.prompt, *example.answers)
        for message in part
        if isinstance(message, dict) and "tool_calls" in message
        for call in message["tool_calls"]
    ]
    schemas = dict(tool_schemas(tools)) if calls and tools else {}
    return any(_is_odd_in_arguments(call["arguments"], schemas.get(call["name"])) for call in calls)


def _is_odd_in_schema(value: Any, place: str) -> bool:
    if isinstance(value, list):
        return any(_is_odd_in_schema(entry, place) for entry in value)
    if not isinstance(value, dict) or place == VALUE:
        return False
    return any(
        place == NAMES or key in NEVER_NULL
        if is_null(member)
        else _is_odd_in_schema(member, SCHEMA if place == NAMES else BELOW[SCHEMA].get(key, SCHEMA))
        for key, member in value.items()
    )


def _is_odd_in_arguments(value: Any, schema: Any) -> bool:
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return any(_is_odd_in_arguments(entry, items) for entry in value)
    if not isinstance(value, dict):
        return False
    inner = {key: property_schema(schema, key) for key in value}
    return any(
        inner[key] is None or not allows_null(inner[key])
        if is_null(member)
        else _is_odd_in_arguments(member, inner[key])
        for key, member in value.items()
    )
