import json
from typing import Any

import pytest

from dpo_cache.data.fields import BadRow
from dpo_cache.data.tool_calls import has_text_arguments, read_call_turn, read_calls, read_tools

ARGUMENTS = {"city": "Oslo", "days": [1, None], "unit": None}
CALL = {"type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
BARE = {"name": "look", "arguments": ARGUMENTS}

CALLS: dict[str, Any] = {
    "one form": [CALL],
    "arguments as JSON": [
        {"type": "function", "function": {"name": "look", "arguments": json.dumps(ARGUMENTS)}}
    ],
    "arguments encoded twice": [
        {"function": {"name": "look", "arguments": json.dumps(json.dumps(ARGUMENTS))}}
    ],
    "arguments as Python writes them": [{"function": {"name": "look", "arguments": str(ARGUMENTS)}}],
    "without type": [{"function": BARE}],
    "bare": [BARE],
    "bare with JSON": [{"name": "look", "arguments": json.dumps(ARGUMENTS)}],
    "parameters for arguments": [{"name": "look", "parameters": ARGUMENTS}],
    "args, of LangChain": [{"name": "look", "args": ARGUMENTS, "type": "tool_call"}],
    "input, of Anthropic": [{"name": "look", "input": ARGUMENTS, "type": "tool_use"}],
    "parameters next to null": [{"function": {"name": "look", "arguments": None, "parameters": ARGUMENTS}}],
    "arguments next to the function": [{"function": {"name": "look"}, "arguments": ARGUMENTS}],
    "an object of lists": {"type": ["function"], "function": [BARE], "id": [None]},
    "one call": BARE,
    "one call as JSON": json.dumps(BARE),
    "calls as JSON": json.dumps([CALL]),
    "function as JSON": [{"type": "function", "function": json.dumps(BARE)}],
    "each call as JSON": [json.dumps(BARE)],
}


@pytest.mark.parametrize("value", CALLS.values(), ids=CALLS)
def test_calls_have_one_form(value: Any) -> None:
    assert read_calls(value, "chosen") == [CALL]


def test_a_call_keeps_its_id_and_the_order_of_its_fields() -> None:
    call = {"id": "call_1", "type": "function", "function": {"arguments": "{}", "name": "look"}}
    (found,) = read_calls([call], "chosen")
    assert json.dumps(found) == (
        '{"type": "function", "id": "call_1", "function": {"arguments": {}, "name": "look"}}'
    )
    assert read_calls([{"id": "call_1", **BARE}], "chosen") == [{"id": "call_1", **CALL}]


@pytest.mark.parametrize("arguments", [{}, "{}", "", "  ", None, "null"])
def test_a_call_without_arguments_has_an_empty_object(arguments: Any) -> None:
    for call in ({"name": "look", "arguments": arguments}, {"name": "look"}):
        assert read_calls([call], "chosen")[0]["function"] == {"name": "look", "arguments": {}}


def test_arguments_that_are_no_json_stay_text() -> None:
    calls = read_calls([{"name": "look", "arguments": '{"city": Os'}], "chosen")
    assert calls[0]["function"]["arguments"] == '{"city": Os'
    assert has_text_arguments(calls)
    assert not has_text_arguments([CALL])


PROBLEMS: dict[str, tuple[Any, str]] = {
    "text": ("look()", "`chosen` has a tool call that is not an object with `name` and `arguments`"),
    "a number": ([3], "`chosen` has a tool call that is not an object with `name` and `arguments`"),
    "no name": ([{"arguments": {}}], "`chosen` has a tool call without the `name` of a function"),
    "an empty name": ([{"name": " "}], "`chosen` has a tool call without the `name` of a function"),
    "another name of arguments": (
        [{"id": "1", "function": {"name": "look", "kwargs": {"a": 1}, "strict": True}}],
        "`chosen` has a tool call without `arguments`, but with `kwargs`",
    ),
    "a name twice": (
        [{"name": "look", "arguments": '{"a": 1, "a": 2}'}],
        "`chosen` has JSON text in which the name 'a' occurs twice in one object",
    ),
    "a name twice in Python": (
        [{"name": "look", "arguments": "{'b': [{'a': 1, 'a': 2}]}"}],
        "`chosen` has JSON text in which the name 'a' occurs twice in one object",
    ),
    "lists of other lengths": (
        {"name": ["look"], "arguments": []},
        "`chosen` has an object of lists (`name`, `arguments`), expected a list of objects",
    ),
    "a list": (
        [{"name": "look", "arguments": [1]}],
        "`chosen` has a tool call whose `arguments` are a list, expected an object",
    ),
    "JSON of a list": (
        [{"name": "look", "arguments": "[1]"}],
        "`chosen` has a tool call whose `arguments` are a list, expected an object",
    ),
    "JSON of text": (
        [{"name": "look", "arguments": '"Oslo"'}],
        "`chosen` has a tool call whose `arguments` are text, expected an object",
    ),
}


@pytest.mark.parametrize(("value", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_other_calls_are_refused(value: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_calls(value, "chosen")
    assert str(caught.value) == reason


@pytest.mark.parametrize("text", [json.dumps(BARE), json.dumps([BARE]), json.dumps(CALL), str(BARE)])
def test_a_turn_of_calls(text: str) -> None:
    assert read_call_turn(text, "chosen") == [CALL]


SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        TOOL,
        json.dumps([TOOL]),
        str([TOOL]),
        [json.dumps(TOOL)],
        [{"type": "function", "function": {"name": "look", "parameters": json.dumps(SCHEMA)}}],
        [{"type": "function", "function": json.dumps(TOOL["function"])}],
        json.dumps(json.dumps([TOOL])),
        {"type": ["function"], "function": [TOOL["function"]]},
        {"tools": [TOOL]},
        {"look": {"parameters": SCHEMA}},
        {"look": TOOL},
        [{"function_declarations": [TOOL["function"]]}],
        {"function_declarations": [TOOL["function"]]},
    ],
)
def test_tools_have_one_form(value: Any) -> None:
    assert read_tools(value) == [TOOL]


def test_bare_tools_stay_bare() -> None:
    bare = {"name": "look", "parameters": SCHEMA}
    assert read_tools([bare]) == [bare]
    assert read_tools([{"name": "look", "parameters": json.dumps(SCHEMA)}]) == [bare]
    assert read_tools({"name": ["look", "wait"], "parameters": [SCHEMA, None]}) == [bare, {"name": "wait"}]
    assert read_tools({"look": bare}) == [bare]
    assert read_tools([{"type": "web_search", "limit": 3}]) == [{"type": "web_search", "limit": 3}]


@pytest.mark.parametrize("value", [None, "", " ", [], "[]", "null", float("nan")])
def test_no_tools(value: Any) -> None:
    assert read_tools(value) == []


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("look", "`tools` is not JSON"),
        ([3], "`tools` has an entry that is not an object"),
        (
            [{"uses": "look", "parameters": {}}],
            "`tools` has an entry without the `name` of a function, but with `uses`, `parameters`",
        ),
        ([{"function": [1]}], "`tools` has an entry whose `function` is not an object"),
        (
            {"type": ["function"], "schema": [{}]},
            "`tools` has an object of lists (`type`, `schema`), expected a list of objects",
        ),
        (
            '[{"name": "a", "name": "b"}]',
            "`tools` has JSON text in which the name 'name' occurs twice in one object",
        ),
        ([{"name": "a", "parameters": "x"}], "`tools` has an entry whose `parameters` are not a JSON object"),
    ],
)
def test_other_tools_are_refused(value: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read_tools(value)
    assert str(caught.value) == reason
