"""Tool calls and tools in one form, which every chat template reads.

a call  {"type": "function", "function": {"name": ..., "arguments": {...}}}, with `id` and other fields that
        it has. `arguments` is an object, unless it is text that is no JSON.
a tool  as the row has it, with `function` and `parameters` as objects. Tools may be in a list, in an object
        by name, in an object around a list, or in an object of lists (the `Sequence` of `datasets`).
"""

from __future__ import annotations

from typing import Any

from dpo_cache.data.fields import BadRow, describe, is_blank, is_null, objects_of_lists
from dpo_cache.data.json_text import NOT_JSON, parse_json, parse_unique

Call = dict[str, Any]

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
CALL_TYPES = ("tool_call", "tool_use")  # types of calls without `function`; templates know "function"
CALL_FIELDS = ("id", "call_id", "tool_call_id", "type", "index", "name", "description", "strict")
TOOL_WRAPPERS = ("tools", "functions", "function_declarations")

ARGUMENTS_AS_TEXT = "the arguments of a tool call are not JSON and are written as text"


def read_calls(value: Any, name: str) -> list[Call]:
    """The calls in the field `tool_calls` or `function_call` of a message in the column `name`.

    `value` is a call, a list of calls, or either as JSON. Raises `BadRow`.
    """
    if isinstance(value, str):
        value = parse_unique(value, name)
    if _is_of_lists(value):
        value = _rows_of_lists(value, name)
    calls = value if isinstance(value, list) else [value]
    return [_call(entry, name) for entry in calls]


def read_call_turn(text: str, name: str) -> list[Call]:
    """The calls of a turn from function_call, whose text is the JSON of a call or of a list of calls."""
    found = parse_unique(text, name)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and _has_parts(call) for call in calls):
        raise BadRow(
            f"`{name}` has a turn from 'function_call' that is neither a JSON object with `name` "
            "and `arguments` nor a list of these"
        )
    return [_call(call, name) for call in calls]


def read_tools(value: Any) -> list[Any]:
    """The tools in the column `tools`: a list, or JSON; none for null and empty text. Raises `BadRow`."""
    while isinstance(value, str):
        value = parse_unique(value, "tools") if value.strip() else None
        if value is NOT_JSON:
            raise BadRow("`tools` is not JSON")
    if not value or is_null(value):
        return []
    return [_tool(tool) for tool in _listed_tools(value)]


def tools_of_functions(value: Any) -> list[Any]:
    """The tools in the column `functions`, as OpenAI wrote them before `tools`; none if it holds others."""
    functions = parse_json(value) if isinstance(value, str) else value
    if not isinstance(functions, list) or not all(
        isinstance(one, dict) and "name" in one for one in functions
    ):
        return []
    return [{"type": "function", "function": function} for function in functions]


def has_text_arguments(calls: list[Call]) -> bool:
    """Return whether the arguments of a call are text that is no JSON; see `ARGUMENTS_AS_TEXT`."""
    return any(isinstance(call["function"]["arguments"], str) for call in calls)


def _has_parts(call: Call) -> bool:
    function = call.get("function") if isinstance(call.get("function"), dict) else call
    assert isinstance(function, dict)
    return not is_blank(function.get("name")) and any(key in function for key in ARGUMENT_KEYS)


def _call(value: Any, name: str) -> Call:
    if isinstance(value, str):
        value = parse_unique(value, name)
    if not isinstance(value, dict):
        raise BadRow(f"`{name}` has a tool call that is not an object with `name` and `arguments`")
    function = value.get("function")
    if isinstance(function, str):
        function = parse_unique(function, name)
    if isinstance(function, dict):
        outside = {key: entry for key, entry in value.items() if key != "function" and not is_null(entry)}
        if all(is_null(function.get(key)) for key in ARGUMENT_KEYS):
            function = {**function, **{key: outside.pop(key) for key in ARGUMENT_KEYS if key in outside}}
    else:
        outside = {key: value[key] for key in ("id", "type") if not is_null(value.get(key))}
        if outside.get("type") in CALL_TYPES:
            outside["type"] = "function"
        function = {key: entry for key, entry in value.items() if key not in ("id", "type")}
    if not isinstance(function.get("name"), str) or is_blank(function["name"]):
        raise BadRow(f"`{name}` has a tool call without the `name` of a function")
    function = _with_arguments(function, name)
    arguments = _arguments(function.get("arguments"), name)
    return {"type": "function", **outside, "function": {**function, "arguments": arguments}}


def _with_arguments(function: Call, name: str) -> Call:
    """The function of a call with its arguments as `arguments`, where they have another name."""
    key = next((key for key in ARGUMENT_KEYS if not is_null(function.get(key))), "arguments")
    if key != "arguments":
        function = {key: entry for key, entry in function.items() if key != "arguments"}
        return {"arguments" if other == key else other: entry for other, entry in function.items()}
    if is_null(function.get("arguments")):
        unknown = [
            key
            for key, entry in function.items()
            if key not in (*CALL_FIELDS, *ARGUMENT_KEYS) and not is_null(entry)
        ]
        if unknown:
            raise BadRow(f"`{name}` has a tool call without `arguments`, but with `{'`, `'.join(unknown)}`")
    return function


def _arguments(value: Any, name: str) -> dict[str, Any] | str:
    """The object that the arguments are, however often they are encoded; text if they are no JSON."""
    parsed = value
    while (
        isinstance(parsed, str) and parsed.strip() and (inner := parse_unique(parsed, name)) is not NOT_JSON
    ):
        parsed = inner
    if is_blank(parsed):
        return {}  # a function without parameters
    if isinstance(parsed, dict):
        return parsed
    if isinstance(parsed, str) and parsed == value:
        return parsed
    raise BadRow(f"`{name}` has a tool call whose `arguments` are {describe(parsed)}, expected an object")


def _listed_tools(value: Any) -> list[Any]:
    """The tools in a list, in an object around a list, by name, or of lists; else the object in a list."""
    if isinstance(value, list):
        return [tool for entry in value for tool in (_listed_tools(entry) if _is_around(entry) else [entry])]
    if not isinstance(value, dict):
        return [value]
    if _is_around(value):
        key = next(key for key in TOOL_WRAPPERS if isinstance(value.get(key), list))
        bare = key != "tools"
        return [
            {"type": "function", "function": tool} if bare and "function" not in tool else tool
            for tool in value[key]
        ]
    if _is_of_lists(value):
        return _rows_of_lists(value, "tools")
    if value.keys().isdisjoint({"type", "function", "name"}) and all(
        isinstance(entry, dict) and entry.keys() & {"function", "name", "parameters", "description"}
        for entry in value.values()
    ):
        return [
            entry
            if entry.keys() & {"function", "name"}
            else {"type": "function", "function": {"name": name, **entry}}
            for name, entry in value.items()
        ]
    return [value]


def _is_of_lists(value: Any) -> bool:
    members = [entry for entry in value.values() if not is_null(entry)] if isinstance(value, dict) else []
    return bool(members) and all(isinstance(entry, list) for entry in members)


def _rows_of_lists(value: dict[str, Any], name: str) -> list[Any]:
    """The objects of a column that is an object of lists, each without its nulls. Raises `BadRow`."""
    lists = {key: entry for key, entry in value.items() if not is_null(entry)}
    rows = objects_of_lists(lists)
    if rows is None or lists.keys().isdisjoint({"function", "name"}):
        raise BadRow(f"`{name}` has an object of lists (`{'`, `'.join(lists)}`), expected a list of objects")
    return [{key: entry for key, entry in row.items() if not is_null(entry)} for row in rows]


def _is_around(value: Any) -> bool:
    """Return whether a value is an object around a list of tools."""
    if not isinstance(value, dict) or not value.keys().isdisjoint({"function", "name"}):
        return False
    found = (value.get(key) for key in TOOL_WRAPPERS)
    return any(isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools) for tools in found)


def _tool(value: Any) -> Any:
    """The tool with its function and parameters as objects where they are JSON. Raises `BadRow`."""
    if isinstance(value, str):
        value = parse_unique(value, "tools")
    if not isinstance(value, dict):
        raise BadRow("`tools` has an entry that is not an object")
    function = value.get("function")
    if isinstance(function, str):
        function = parse_unique(function, "tools")
    if isinstance(function, dict):
        _check_named(function)
        return {**value, "function": _with_schema(function)}
    if not is_null(function):
        raise BadRow("`tools` has an entry whose `function` is not an object")
    if value.get("type") in (None, "function"):  # others name a tool that the template knows
        _check_named(value)
    return _with_schema(value)


def _check_named(function: dict[str, Any]) -> None:
    if not any("name" in key and isinstance(entry, str) for key, entry in function.items()):
        members = f", but with `{'`, `'.join(map(str, function))}`" if function else ""
        raise BadRow(f"`tools` has an entry without the `name` of a function{members}")


def _with_schema(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    if not isinstance(parameters, str):
        return function
    parsed = parse_unique(parameters, "tools") if parameters.strip() else {}
    if not isinstance(parsed, dict):
        raise BadRow("`tools` has an entry whose `parameters` are not a JSON object")
    return {**function, "parameters": parsed}
