"""Tool calls and tools in one form, which every chat template reads.

a call  {"type": "function", "function": {"name": ..., "arguments": {...}}}, with `id` and other fields that
        it has. `arguments` is an object, unless it is text that is no JSON.
a tool  as the row has it, with `parameters` as an object.
"""

from __future__ import annotations

from typing import Any

from dpo_cache.data.fields import BadRow, describe, is_blank, is_null
from dpo_cache.data.serialized import NOT_JSON, parse_json

Call = dict[str, Any]

ARGUMENTS_AS_TEXT = "the arguments of a tool call are no JSON and are written as text"


def read_calls(value: Any, name: str) -> list[Call]:
    """The calls in the field `tool_calls` or `function_call` of a message in the column `name`.

    `value` is a call, a list of calls, or either as JSON. Raises `BadRow`.
    """
    if isinstance(value, str):
        value = parse_json(value)
    calls = value if isinstance(value, list) else [value]
    return [_call(entry, name) for entry in calls]


def read_call_turn(text: str, name: str) -> list[Call]:
    """The calls of a turn from function_call, whose text is the JSON of a call or of a list of calls."""
    found = parse_json(text)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and _has_parts(call) for call in calls):
        raise BadRow(
            f"`{name}` has a turn from 'function_call' that is no JSON object with `name` and "
            "`arguments`, nor a list of these"
        )
    return [_call(call, name) for call in calls]


def read_tools(value: Any) -> list[Any]:
    """The tools in the column `tools`: a list, or JSON; none for null and empty text. Raises `BadRow`."""
    if isinstance(value, str):
        value = parse_json(value) if value.strip() else None
        if value is NOT_JSON:
            raise BadRow("`tools` is not JSON")
    if not value or is_null(value):
        return []
    tools = value if isinstance(value, list) else [value]
    return [_tool(tool) for tool in tools]


def tools_of_functions(value: Any) -> list[Any]:
    """The tools in the column `functions`, as OpenAI wrote them before `tools`; none if it holds others."""
    functions = parse_json(value) if isinstance(value, str) else value
    if not isinstance(functions, list) or not all(
        isinstance(one, dict) and "name" in one for one in functions
    ):
        return []
    return [{"type": "function", "function": function} for function in functions]


def has_text_arguments(calls: list[Call]) -> bool:
    """Whether the arguments of a call are text that is no JSON; see `ARGUMENTS_AS_TEXT`."""
    return any(isinstance(call["function"]["arguments"], str) for call in calls)


def _has_parts(call: Call) -> bool:
    function = call.get("function") if isinstance(call.get("function"), dict) else call
    assert isinstance(function, dict)
    return not is_blank(function.get("name")) and ("arguments" in function or "parameters" in function)


def _call(value: Any, name: str) -> Call:
    if isinstance(value, str):
        value = parse_json(value)
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` has a tool call that is no object with `name` and `arguments`")
    function = value.get("function")
    if isinstance(function, str):
        function = parse_json(function)
    if isinstance(function, dict):
        outside = {key: entry for key, entry in value.items() if key != "function" and not is_null(entry)}
    else:
        outside = {key: value[key] for key in ("id", "type") if not is_null(value.get(key))}
        function = {key: entry for key, entry in value.items() if key not in ("id", "type")}
    if not isinstance(function.get("name"), str) or is_blank(function["name"]):
        raise BadRow(f"`{name}` has a tool call without the `name` of a function")
    if "arguments" not in function and "parameters" in function:
        function = {"arguments" if key == "parameters" else key: entry for key, entry in function.items()}
    arguments = _arguments(function.get("arguments"), name)
    return {"type": "function", **outside, "function": {**function, "arguments": arguments}}


def _arguments(value: Any, name: str) -> dict[str, Any] | str:
    """The object that the arguments are, however often they are encoded; text if they are no JSON."""
    parsed = value
    while isinstance(parsed, str) and parsed.strip() and (inner := parse_json(parsed)) is not NOT_JSON:
        parsed = inner
    if is_blank(parsed):
        return {}  # of a function without parameters
    if isinstance(parsed, dict):
        return parsed
    if isinstance(parsed, str) and parsed == value:
        return parsed
    raise BadRow(f"`{name}` has a tool call whose `arguments` are {describe(parsed)}, expected an object")


def _tool(value: Any) -> Any:
    """The tool with its parameters as an object where they are JSON."""
    if isinstance(value, str):
        value = parse_json(value)
    if not isinstance(value, dict):
        raise BadRow("`tools` has an entry that is no object")
    if isinstance(value.get("function"), dict):
        return {**value, "function": _with_schema(value["function"])}
    return _with_schema(value)


def _with_schema(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    if not isinstance(parameters, str):
        return function
    parsed = parse_json(parameters) if parameters.strip() else {}
    if not isinstance(parsed, dict):
        raise BadRow("`tools` has an entry whose `parameters` are no JSON object")
    return {**function, "parameters": parsed}
