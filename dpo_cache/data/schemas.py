"""Schemas of tools: where nulls may be, and what they allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_cache.data.json_text import parse_json

# Where a value is. Members of `NAMES` are schemas by name; of `VALUE`, anything.
MESSAGE, CALL, SCHEMA, NAMES, VALUE = "message", "call", "schema", "names", "value"
BELOW = {
    MESSAGE: {"tool_calls": CALL, "function_call": CALL, "tools": SCHEMA, "functions": SCHEMA},
    CALL: dict.fromkeys(("arguments", "parameters", "args", "input"), VALUE),
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


def property_schema(schema: Any, key: str) -> Any:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties.get(key) if isinstance(properties, dict) else None


def allows_null(schema: Any) -> bool:
    """Return whether a JSON schema allows null. Its own nulls may be Arrow's."""
    if not isinstance(schema, dict) or schema.get("nullable"):
        return True
    options = [option for key in ("anyOf", "oneOf") for option in schema.get(key) or ()]
    if options:
        return any(allows_null(option) for option in options)
    kinds = schema.get("type")
    return kinds is None or kinds == "null" or (isinstance(kinds, list) and "null" in kinds)


def tool_schemas(tools: Any) -> Iterator[tuple[str, Any]]:
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
