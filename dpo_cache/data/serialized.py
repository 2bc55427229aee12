"""Messages that a text column holds as JSON, or as the Python literal that pandas writes into CSV.

Text is messages if it is a list of objects, one object, or an object with such a list as `messages`, where
every object has a role (`role` or `from`) and a content (`content`, `value` or tool calls). All other JSON
stays text: it may be what the answer is about.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from dpo_cache.data.fields import BadRow
from dpo_cache.data.roles import FUNCTION_CALL, standard_role

NOT_JSON = object()

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
CALL_KEYS = ("tool_calls", "function_call")
WRAPPERS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "instruction", "conversations", "messages")
ANSWERS = ("chosen", "rejected")
STRUCTURED = ("conversations", "messages", "responses", "completions", "history", "scores", "ranks")
READ_AS_TEXT = "JSON that looks like messages is read as text"

_MAY_BE_MESSAGES = re.compile(r"""\s*[\[{].*?["'](?:role|from)["']\s*:""", re.DOTALL)
_STARTS_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|from|content|value)["']\s*:\s*["']""")


def parse_json(text: str) -> Any:
    """The value of JSON text or of a Python literal in brackets; `NOT_JSON` for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if text.lstrip()[:1] not in ("[", "{"):
        return NOT_JSON
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes
            literal = ast.literal_eval(text.strip())
        return json.loads(json.dumps(literal))  # tuples as lists
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return NOT_JSON


def find_messages(value: Any) -> list[Any] | None:
    """The messages that a value holds: as a list, as one message, in an object around them, or in an object
    of lists (the `Sequence` of `datasets`). None if it holds no messages.
    """
    if isinstance(value, dict):
        wrapped = next((value[key] for key in WRAPPERS if isinstance(value.get(key), list)), None)
        value = wrapped if wrapped is not None else _rows_of_lists(value)
    if isinstance(value, list) and value and all(_is_message(entry) for entry in value):
        return value
    return None


def parse_messages(text: str) -> list[Any] | None:
    """The messages that text holds, or None."""
    if not _MAY_BE_MESSAGES.match(text):
        return None
    return find_messages(parse_json(text))


def parse_columns(row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row with messages and lists in place of the text that holds them, and notes on the row.

    An answer is messages only if it begins with a turn of the assistant or repeats a text of the question;
    else it is an answer that happens to be such JSON. Raises `BadRow` for text that begins like messages and
    cannot be read, where it can be nothing else.
    """
    found = {name: parsed for name, value in row.items() if (parsed := _parsed(name, value)) is not None}
    question = next((name for name in QUESTIONS if row.get(name) is not None), None)
    if question is not None:
        _check_not_broken(question, row[question])
    if question is None or question in found:
        for name in ANSWERS:
            _check_not_broken(name, row.get(name))
    if not found:
        return row, ()
    kept = found
    if question is not None:
        texts = _texts(found.get(question, row[question]))
        kept = {
            name: value
            for name, value in found.items()
            if name in QUESTIONS or not _holds_messages(value) or _is_answer(value, texts)
        }
    return type(row)({**row, **kept}), (READ_AS_TEXT,) if len(kept) < len(found) else ()


def _parsed(name: str, value: Any) -> Any:
    """The list or messages in a column that holds text or texts; None if it holds none."""
    if isinstance(value, str):
        if (messages := parse_messages(value)) is not None:
            return messages
        listed = parse_json(value) if name in STRUCTURED and value.lstrip()[:1] == "[" else None
        if not isinstance(listed, list):
            return None
        return _parsed(name, listed) or listed
    if isinstance(value, list) and value and isinstance(value[0], str):
        entries = [parse_messages(entry) if isinstance(entry, str) else None for entry in value]
        if any(entry is not None for entry in entries):
            return [text if entry is None else entry for entry, text in zip(entries, value, strict=True)]
    return None


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not any(isinstance(value.get(key), str) for key in ROLE_KEYS):
        return False
    has_content = any(isinstance(value.get(key), (str, list)) for key in CONTENT_KEYS)
    return has_content or any(value.get(key) for key in CALL_KEYS)


def _holds_messages(value: Any) -> bool:
    """Whether a list has messages or lists of them, and not only texts or numbers."""
    return any(
        _is_message(entry) or (isinstance(entry, list) and entry and _is_message(entry[0])) for entry in value
    )


def _texts(question: Any) -> set[str]:
    """The texts of a question: its own, or those of its messages."""
    if isinstance(question, str):
        return {question.strip()}
    contents = [entry.get(key) for entry in find_messages(question) or () for key in CONTENT_KEYS]
    return {content.strip() for content in contents if isinstance(content, str)}


def _is_answer(messages: list[Any], question_texts: set[str]) -> bool:
    """Whether messages (or one of several lists of them) can answer a question with these texts."""
    if isinstance(messages[0], (list, str)):  # ranked answers
        return any(isinstance(entry, list) and _is_answer(entry, question_texts) for entry in messages)
    role = next(messages[0][key] for key in ROLE_KEYS if isinstance(messages[0].get(key), str))
    return standard_role(role) in ("assistant", FUNCTION_CALL) or not question_texts.isdisjoint(
        _texts(messages)
    )


def _is_broken(value: Any) -> bool:
    """Whether text begins like messages but is no JSON, for example because numpy printed it."""
    return (
        isinstance(value, str)
        and _STARTS_LIKE_MESSAGES.match(value) is not None
        and parse_json(value) is NOT_JSON
    )


def _check_not_broken(name: str, value: Any) -> None:
    if _is_broken(value):
        raise BadRow(
            f"`{name}` begins like a list of messages but is no JSON, expected what `json.dumps` writes"
        )


def _rows_of_lists(value: dict[str, Any]) -> list[Any]:
    """Objects of lists as a list of objects: {"role": [...], "content": [...]}; else the object in a list."""
    lists = [entry for entry in value.values() if isinstance(entry, list)]
    has_roles = any(isinstance(value.get(key), list) for key in ROLE_KEYS)
    if has_roles and len(lists) == len(value) and len({len(entry) for entry in lists}) == 1:
        return [dict(zip(value, entries, strict=True)) for entries in zip(*lists, strict=True)]
    return [value]
