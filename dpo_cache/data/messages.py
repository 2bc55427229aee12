"""Fields of a row as text or messages. `BadRow` names the first field that cannot be used, and why."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


class BadRow(Exception):
    """A row cannot be used; the message completes 'row 7: ...'."""


def is_blank(value: Any) -> bool:
    """Whether a field is missing, or text of nothing but spaces."""
    return value is None or (isinstance(value, str) and not value.strip())


def describe(value: Any) -> str:
    """The type of a field, for an error message."""
    return "missing" if value is None else f"a {type(value).__name__}"


def read_text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"`{name}` is {describe(value)}, expected text")
    if is_blank(value):
        raise BadRow(f"`{name}` is empty")
    return value


def read_messages(row: dict[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list):
        raise BadRow(f"`{name}` is {describe(value)}, expected messages")
    return [_message(message, name, "role", "content") for message in value]


def read_system(row: dict[str, Any]) -> list[Message]:
    """The system message, where the row has one."""
    if is_blank(row.get("system")):
        return []
    return [{"role": "system", "content": read_text(row, "system")}]


def read_history(row: dict[str, Any]) -> list[Message]:
    """Earlier turns: a list of [question, answer]."""
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise BadRow("`history` is not a list of [question, answer]")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def read_prompt(row: dict[str, Any]) -> list[Message]:
    """Messages of the column `prompt`, after the column `system` if they begin with no system message."""
    is_text = isinstance(row["prompt"], str)
    messages = (
        [{"role": "user", "content": read_text(row, "prompt")}] if is_text else read_messages(row, "prompt")
    )
    if not messages or messages[0]["role"] == "system":
        return messages
    return [*read_system(row), *messages]


def read_answer(row: dict[str, Any], name: str, prompt: list[Message]) -> list[Message]:
    """The answer's messages, without the prompt where they repeat it."""
    if isinstance(row[name], str):
        return [{"role": "assistant", "content": read_text(row, name)}]
    messages = read_messages(row, name)
    if [_stripped(message) for message in messages[: len(prompt)]] == [*map(_stripped, prompt)]:
        messages = messages[len(prompt) :]
    if messages and messages[0]["role"] in ("user", "system"):
        raise BadRow(
            f"`{name}` starts with a message from {messages[0]['role']}, expected the answer, or the "
            "whole prompt before it"
        )
    return messages


def read_sharegpt_turn(turn: Any, name: str) -> Message:
    message = _message(turn, name, "from", "value")
    if message["role"] not in SHAREGPT_ROLES:
        raise BadRow(
            f"`{name}` has a turn from {message['role']!r}, expected one of {', '.join(SHAREGPT_ROLES)}"
        )
    role = SHAREGPT_ROLES[message["role"]]
    if message["role"] == "function_call":
        return {**message, "role": role, "content": "", "tool_calls": _tool_calls(message["content"], name)}
    return {**message, "role": role}


def read_sharegpt_answer(row: dict[str, Any], name: str) -> list[Message]:
    answer = read_sharegpt_turn(row[name], name)
    if answer["role"] != "assistant":
        raise BadRow(f"`{name}` is a turn from {row[name]['from']!r}, expected one from gpt or function_call")
    return [answer]


def _message(message: Any, name: str, role_field: str, content_field: str) -> Message:
    """The message with `role` and `content` in place of its own names, and without fields that are null."""
    if not isinstance(message, dict) or not isinstance(message.get(role_field), str):
        raise BadRow(f"`{name}` has a message without `{role_field}`")
    role, content = message[role_field], message.get(content_field)
    extras = {
        key: value
        for key, value in message.items()
        if key not in (role_field, content_field) and value is not None
    }
    if content is None and extras.get("tool_calls"):
        content = ""
    elif not isinstance(content, str):
        raise BadRow(f"`{name}` has a message whose `{content_field}` is {describe(content)}, expected text")
    elif is_blank(content) and role != "system" and not extras.get("tool_calls"):
        raise BadRow(f"`{name}` has a message whose `{content_field}` is empty")
    return {**extras, "role": role, "content": content}


def _stripped(message: Message) -> Message:
    """The message without spaces around it, to be compared."""
    return {**message, "content": message["content"].strip()}


def _tool_calls(value: str, name: str) -> list[dict[str, Any]]:
    """Calls as chat templates read them, from the JSON in a ShareGPT turn; arguments may be JSON in it."""
    try:
        found = json.loads(value)
        calls = [
            {"name": call["name"], "arguments": _parsed(call["arguments"])}
            for call in (found if isinstance(found, list) else [found])
        ]
    except (ValueError, KeyError, TypeError):
        calls = []
    if not calls or not all(
        call["name"] and isinstance(call["name"], str) and isinstance(call["arguments"], dict)
        for call in calls
    ):
        raise BadRow(
            f"`{name}` has a turn from 'function_call' that is no JSON object with `name` and "
            "`arguments`, nor a list of these"
        )
    return [{"type": "function", "function": call} for call in calls]


def _parsed(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
