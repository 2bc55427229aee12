"""Messages that a text column holds as JSON, or as the Python literal that pandas writes into CSV.

Text is messages if it is a list of objects, one object, or an object with such a list as `messages`, where
every object has a role (`role` or `from`) and a content (`content`, `value` or tool calls). All other JSON
stays text: it may be what the answer is about.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_cache.data.broken_messages import find_broken, is_printed
from dpo_cache.data.columns import LISTS, PROMPTS, RANKS, RESPONSES, SCORES, SIDES
from dpo_cache.data.fields import BadRow, objects_of_lists
from dpo_cache.data.json_text import NOT_JSON as NOT_JSON
from dpo_cache.data.json_text import parse_json
from dpo_cache.data.roles import FUNCTION_CALL, standard_role

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
CALL_KEYS = ("tool_calls", "function_call")
WRAPPERS = ("messages", "conversations", "conversation")
STRUCTURED = {"history", *LISTS, *SCORES, *RANKS}  # columns in which a JSON list is never text
ANSWERS = {name for pair in (*SIDES, *RESPONSES) for name in pair}
COLUMNS = {*PROMPTS, *STRUCTURED, *ANSWERS}
ENCODED_TWICE = ('"[', '"{')
READ_AS_TEXT = "JSON that looks like messages is read as text"

_MAY_BE_MESSAGES = re.compile(r"""\s*(?:\[\s*)?\{.*?["'](?:role|from)["']\s*:""", re.DOTALL)


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
    """The messages that text holds, or the object around them; None if it holds none.

    The text may be JSON of such text.
    """
    if text[:2] in ENCODED_TWICE and isinstance(inner := parse_json(text), str):
        return parse_messages(inner)
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
    is_asked_in_text = question is not None and asked is None and isinstance(row[question], str)
    found, unused, broken = {}, [], {}
    for name in row:
        if name in COLUMNS:
            is_prompt = name in PROMPTS
            value, is_refused = _parsed(row[name], name in STRUCTURED, None if is_prompt else texts)
            if value is not None:
                found[name] = value
            elif name == question or name in ANSWERS or name in LISTS:
                is_question = name == question
                if kind := find_broken(
                    row[name], is_sure=not is_text and (is_question or not is_asked_in_text)
                ):
                    broken[name] = kind
            if is_refused or (is_text and value is not None and (name == question or not is_prompt)):
                unused.append(name)
    if broken:
        _check_broken(row, broken, question, texts if is_asked_in_text else None, found)
        unused.extend(broken)
    notes = (READ_AS_TEXT,) if unused else ()
    return (type(row)({**row, **found}) if found and not is_text else row), notes


def _may_be_parsed(value: Any) -> bool:
    """Return whether a column may hold messages or a list as text; quick if the text begins with a letter."""
    if isinstance(value, str):
        if value[:1] == '"':
            return value[:2] in ENCODED_TWICE
        start = value.lstrip()[:1] if value[:1].isspace() else value[:1]
        return start in ("[", "{") or value.startswith("array(")
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
    if not has_content and "content" in value and isinstance(value.get("role"), str):
        has_content = standard_role(value["role"]) is not None  # null or an object, which `messages.py` reads
    return has_content or any(value.get(key) for key in CALL_KEYS)


def _texts(question: Any) -> set[str]:
    """The texts of a question: its own, or those of its messages."""
    if isinstance(question, str):
        return {question.strip()}
    contents = [entry.get(key) for entry in find_messages(question) or () for key in CONTENT_KEYS]
    return {content.strip() for content in contents if isinstance(content, str)}


def _is_answer(value: Any, question_texts: set[str]) -> bool:
    """Return whether messages can answer a question with these texts."""
    messages = find_messages(value) or []
    role = next(messages[0][key] for key in ROLE_KEYS if isinstance(messages[0].get(key), str))
    is_reply = standard_role(role) in ("assistant", FUNCTION_CALL)
    return is_reply or not question_texts.isdisjoint(_texts(messages))


def _check_broken(
    row: dict[str, Any],
    broken: dict[str, str],
    question: str | None,
    texts: set[str] | None,
    found: dict[str, Any],
) -> None:
    """Raise `BadRow` for the first of the broken columns, unless it may be an answer in text.

    `texts` are those of a question in text, else None. Its answers are broken messages if all of them are and
    one repeats the question or is quoted as Python prints it.
    """
    name = question if question in broken else next(iter(broken))
    answers = [column for column in found if column in ANSWERS] + [*broken]
    if name != question and texts is not None:
        values = [row[column] for column in broken]
        shown = [value if isinstance(value, str) else str(value[0]) for value in values]
        is_sure = any(is_printed(text) or any(asked in text for asked in texts) for text in shown)
        if not is_sure or (len(answers) < 2 and name not in LISTS):
            return
    raise BadRow(f"`{name}` looks like messages {broken[name]}, expected what `json.dumps` writes")


def _rows_of_lists(value: dict[str, Any]) -> list[Any]:
    """Objects of lists as a list of objects: {"role": [...], "content": [...]}; else the object in a list."""
    found = objects_of_lists(value)
    return [value] if found is None or value.keys().isdisjoint(ROLE_KEYS) else found
