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
from collections.abc import Sequence
from typing import Any

from dpo_cache.data.columns import LISTS, PROMPTS, RANKS, RESPONSES, SCORES, SIDES
from dpo_cache.data.fields import BadRow
from dpo_cache.data.roles import FUNCTION_CALL, standard_role

NOT_JSON = object()

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
CALL_KEYS = ("tool_calls", "function_call")
WRAPPERS = ("messages", "conversations", "conversation")
STRUCTURED = {"history", *LISTS, *SCORES, *RANKS}  # columns in which a JSON list is never text
ANSWERS = {name for pair in (*SIDES, *RESPONSES) for name in pair}
COLUMNS = {*PROMPTS, *STRUCTURED, *ANSWERS}
READ_AS_TEXT = "JSON that looks like messages is read as text"

_MAY_BE_MESSAGES = re.compile(r"""\s*(?:\[\s*)?\{.*?["'](?:role|from)["']\s*:""", re.DOTALL)
_STARTS_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|from|content|value)["']\s*:\s*["']""")


def parse_json(text: str) -> Any:
    """The value of JSON text or of a Python literal in brackets; `NOT_JSON` for other text."""
    try:
        return json.loads(text, strict=False)
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


def parse_unique(text: str, name: str) -> Any:
    """The same for a part of the column `name`. Raises `BadRow` if an object has a name twice."""
    value = parse_json(text)
    if value is not NOT_JSON and (twice := _name_twice(text)) is not None:
        raise BadRow(f"`{name}` has JSON text in which the name {twice!r} is there twice in one object")
    return value


def _name_twice(text: str) -> str | None:
    """The first name that an object in JSON text, or a dict in a Python literal, has twice."""
    found: list[str] = []

    def note(names: Sequence[Any]) -> None:
        found.extend(name for place, name in enumerate(names) if name in names[:place])

    try:
        json.loads(text, strict=False, object_pairs_hook=lambda pairs: note([name for name, _ in pairs]))
    except ValueError:
        for node in ast.walk(ast.parse(text.strip(), mode="eval")):
            if isinstance(node, ast.Dict):
                note([key.value for key in node.keys if isinstance(key, ast.Constant)])
    return found[0] if found else None


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


def parse_messages(text: str) -> Any:
    """The messages that text holds, or the object around them; None if it holds none."""
    if not _MAY_BE_MESSAGES.match(text):
        return None
    value = parse_json(text)
    return None if find_messages(value) is None else value


def parse_columns(row: dict[str, Any], *, is_text: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The row with messages and lists in place of the text that holds them, and notes on the row.

    An answer is messages only if it begins with a turn of the assistant or repeats a text of the question;
    else it is an answer that happens to be such JSON. Rows of text (`is_text`) stay text. Raises `BadRow` for
    text that begins like messages and cannot be read, where it can be nothing else.
    """
    if not any(name in COLUMNS and _may_be_parsed(value) for name, value in row.items()):
        return row, ()
    question = next((name for name in PROMPTS if row.get(name) is not None), None)
    asked = None if question is None else _parsed(row[question], question in STRUCTURED, None)[0]
    texts = None if question is None else _texts(row[question] if asked is None else asked)
    found, unused = {}, []
    for name in row:
        if name in COLUMNS:
            is_prompt = name in PROMPTS
            value, is_refused = _parsed(row[name], name in STRUCTURED, None if is_prompt else texts)
            if value is not None:
                found[name] = value
            elif not is_text and (name == question or (name in ANSWERS and (asked or not question))):
                _check_not_broken(name, row[name])
            if is_refused or (is_text and value is not None and (name == question or not is_prompt)):
                unused.append(name)
    notes = (READ_AS_TEXT,) if unused else ()
    return (type(row)({**row, **found}) if found and not is_text else row), notes


def _may_be_parsed(value: Any) -> bool:
    """Whether a column may hold messages or a list as text; quick for text that begins with a letter."""
    if isinstance(value, str):
        return value[:1] in ("[", "{") or (value[:1].isspace() and value.lstrip()[:1] in ("[", "{"))
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def with_parsed_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row of `parse_columns`, or the row itself where text cannot be read."""
    try:
        return parse_columns(row)[0]
    except BadRow:
        return row


def _parsed(value: Any, is_structured: bool, texts: set[str] | None) -> tuple[Any, bool]:
    """The messages or the list in a column that holds text or texts, and whether some stay text.

    None if it holds none. `texts` are those of the question that they answer, or None.
    """
    if isinstance(value, str):
        if (messages := parse_messages(value)) is not None:
            is_used = texts is None or _is_answer(messages, texts)
            return (messages, False) if is_used else (None, True)
        listed = parse_json(value) if is_structured and value.lstrip()[:1] == "[" else None
        if not isinstance(listed, list):
            return None, False
        entries, is_refused = _parsed(listed, False, texts)
        return entries or listed, is_refused
    if isinstance(value, list) and value and isinstance(value[0], str):
        found = [_parsed(entry, False, texts) for entry in value]
        is_any = any(entry is not None for entry, _ in found)
        entries = [text if entry is None else entry for (entry, _), text in zip(found, value, strict=True)]
        return entries if is_any else None, any(is_refused for _, is_refused in found)
    return None, False


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not any(isinstance(value.get(key), str) for key in ROLE_KEYS):
        return False
    has_content = any(isinstance(value.get(key), (str, list)) for key in CONTENT_KEYS)
    return has_content or any(value.get(key) for key in CALL_KEYS)


def _texts(question: Any) -> set[str]:
    """The texts of a question: its own, or those of its messages."""
    if isinstance(question, str):
        return {question.strip()}
    contents = [entry.get(key) for entry in find_messages(question) or () for key in CONTENT_KEYS]
    return {content.strip() for content in contents if isinstance(content, str)}


def _is_answer(value: Any, question_texts: set[str]) -> bool:
    """Whether messages can answer a question with these texts."""
    messages = find_messages(value) or []
    role = next(messages[0][key] for key in ROLE_KEYS if isinstance(messages[0].get(key), str))
    is_reply = standard_role(role) in ("assistant", FUNCTION_CALL)
    return is_reply or not question_texts.isdisjoint(_texts(messages))


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
