"""Messages of every kind as chat templates read them: `role` and `content`, with fields of their own.

A message of a row may have `from` and `value` for `role` and `content`, a role under another name, content
in parts, and tool calls as OpenAI writes them, in text or as an object. `BadRow` names the first field that
cannot be used, and why.
"""

from __future__ import annotations

import json
from typing import Any

from dpo_cache.data.fields import BadRow as BadRow
from dpo_cache.data.fields import describe as describe
from dpo_cache.data.fields import is_blank as is_blank
from dpo_cache.data.fields import is_null
from dpo_cache.data.fields import read_text as read_text
from dpo_cache.data.lost import media_of, media_of_part
from dpo_cache.data.roles import FUNCTION_CALL, known_roles, standard_role
from dpo_cache.data.serialized import CALL_KEYS, CONTENT_KEYS, ROLE_KEYS, find_messages
from dpo_cache.data.tool_calls import read_call_turn, read_calls

Message = dict[str, Any]

CLEAN_ROLES = ("user", "assistant", "system", "tool", "developer")
MAY_BE_EMPTY = ("system", "developer", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
OF_TEXT_PARTS = (
    "type",
    "text",
    "value",
    "content",
    "id",
    "index",
    "cache_control",
    "citations",
    "annotations",
    "logprobs",
)


def read_messages(row: dict[str, Any], name: str) -> list[Message]:
    """The messages of a column: a list, one message, or an object around a list."""
    value = row[name]
    if not isinstance(value, list):
        found = find_messages(value)
        if found is None:
            raise BadRow(f"`{name}` is {describe(value)}, expected messages")
        value = found
    return [read_message(message, name) for message in value]


def read_message(message: Any, name: str, role_key: str = "role") -> Message:
    """The message as chat templates read it. `role_key` is the one that an error names. Raises `BadRow`."""
    if _is_clean(message):
        return message
    found = next(
        (key for key in ROLE_KEYS if isinstance(message, dict) and isinstance(message.get(key), str)), None
    )
    if found is None:
        raise BadRow(f"`{name}` has a message without `{role_key}`")
    role = standard_role(message[found])
    if role is None:
        raise BadRow(f"`{name}` has a turn from {message[found]!r}, expected one of {known_roles()}")
    content_key = next((key for key in CONTENT_KEYS if not is_null(message.get(key))), None)
    extras = {
        key: value for key, value in message.items() if key not in (found, content_key) and not is_null(value)
    }
    content = message[content_key] if content_key else None
    if not isinstance(content, str):
        shown = content_key or ("content" if role_key == "role" else "value")
        content = _read_content(content, name, shown, {**extras, "role": role})
    if role == FUNCTION_CALL:
        calls = read_call_turn(content, name)
        return {**extras, "role": "assistant", "content": "", "tool_calls": calls}
    extras = _with_calls(extras, name)
    if is_blank(content) and role not in MAY_BE_EMPTY and not extras.get("tool_calls"):
        raise BadRow(f"`{name}` has a message whose `{content_key}` is empty")
    return {**extras, "role": role, "content": content}


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


def read_sharegpt_turn(turn: Any, name: str) -> Message:
    """The message that a turn with `from` and `value` is."""
    return read_message(turn, name, "from")


def read_sharegpt_answer(row: dict[str, Any], name: str) -> list[Message]:
    """The answer that is one turn, or a list of turns."""
    turns = row[name] if isinstance(row[name], list) and row[name] else [row[name]]
    answer = [read_sharegpt_turn(turn, name) for turn in turns]
    if answer[0]["role"] != "assistant":
        sender = next(turns[0][key] for key in ROLE_KEYS if isinstance(turns[0].get(key), str))
        raise BadRow(f"`{name}` is a turn from {sender!r}, expected one from gpt or function_call")
    return answer


def _is_clean(message: Any) -> bool:
    """Return whether a message is as chat templates read it: a role and text, and nothing else."""
    if not isinstance(message, dict) or len(message) != 2 or message.get("role") not in CLEAN_ROLES:
        return False
    content = message.get("content")
    return isinstance(content, str) and not is_blank(content)


def _read_content(content: Any, name: str, key: str, message: Message) -> str:
    """The text of content that is no string; media are left out, see `lost.media_notes`."""
    if is_null(content) and any(message.get(calls) for calls in CALL_KEYS):
        return ""
    place = f"`{name}` has a message whose `{key}`"
    if not isinstance(content, (list, dict)):
        raise BadRow(f"{place} is {describe(None if is_null(content) else content)}, expected text")
    parts = content if isinstance(content, list) else [content]
    is_result = standard_role(message["role"]) == "tool"
    texts = [_text_of_part(part, is_result) for part in parts]
    unknown = [
        part
        for part, text in zip(parts, texts, strict=True)
        if text is None and not _is_media(part, is_result)
    ]
    if not unknown and (any(text is not None for text in texts) or not parts):
        return "".join(text for text in texts if text is not None)
    if not unknown:
        raise BadRow(f"{place} has no text, and only text is scored")
    if is_result:
        return json.dumps(content, ensure_ascii=False)  # a result that is data
    others = _others_of_text(unknown[0])
    if others:
        raise BadRow(f"{place} has text in an object with `{'`, `'.join(others)}`, expected text")
    kind = unknown[0].get("type") if isinstance(unknown[0], dict) else None
    shown = f"the type {kind!r}" if kind else f"the form {describe(unknown[0]).removeprefix('a ')}"
    raise BadRow(f"{place} has a part of {shown}, expected text")


def _text_of_part(part: Any, is_result: bool) -> str | None:
    """The text of a content part: a string, or an object with `text`, `value` or `content`.

    An object with other members is none: these would be lost. Media next to the text are left out, but an
    object without a type in the result of a tool is data.
    """
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") not in (None, *TEXT_PARTS):
        return None
    others = _others_of_text(part)
    if others and (is_result or not all(map(media_of, others))):
        return None
    keys = ("text", "value", "content") if part.get("type") else ("text",)
    return next((part[key] for key in keys if isinstance(part.get(key), str)), None)


def _others_of_text(part: Any) -> list[str]:
    """The members of an object with text that no text part has."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return []
    known = OF_TEXT_PARTS if part.get("type") in TEXT_PARTS else ("text", "type")
    return [key for key, value in part.items() if key not in known and not is_null(value)]


def _is_media(part: Any, is_result: bool) -> bool:
    is_part = isinstance(part, dict) and (not is_result or bool(part.get("type")))
    return is_part and media_of_part(part) is not None


def _with_calls(extras: Message, name: str) -> Message:
    """The fields of a message with its tool calls in one form, as `tool_calls`; none if it has no calls."""
    found = {key: extras[key] for key in CALL_KEYS if key in extras}
    if not found:
        return extras
    others = {key: value for key, value in extras.items() if key not in CALL_KEYS}
    calls = next((read_calls(value, name) for value in found.values() if value and value != "null"), [])
    return {**others, "tool_calls": calls} if calls else others
