"""Preference data as people store it -> one shape: a prompt, a chosen and a rejected answer.

A format is recognised from the columns and the type of their first value:

    text             prompt, chosen, rejected: strings
    conversation     prompt: string or messages; chosen, rejected: messages, with or without the prompt repeated
    implicit         chosen, rejected: whole dialogues, as messages or text; the prompt is what they share
    sharegpt         conversations (from, value); chosen, rejected: one turn each
    alpaca           instruction, input (may be missing or empty); chosen, rejected: strings

Messages are `{"role": ..., "content": ...}`. Everything but `text` and implicit text goes through the chat template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cache.errors import DataError

Message = dict[str, str]
Content = str | list[Message]

ACCEPTED = """\
  prompt, chosen, rejected                    (text, or messages with role and content)
  chosen, rejected                            (whole dialogues that share the prompt)
  conversations, chosen, rejected             (ShareGPT: from and value)
  instruction, input, chosen, rejected        (Alpaca)"""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Example:
    """One row: prompt and answers, either all text or all messages."""

    prompt: Content
    chosen: Content
    rejected: Content


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used, in words that complete 'row 7: ...'."""

    reason: str


def detect_format(columns: Sequence[str], first_row: dict[str, Any]) -> str:
    """The format's name. Raises `DataError` naming the columns found and those accepted."""
    present = set(columns)
    if {"chosen", "rejected"} <= present:
        if "conversations" in present:
            return "sharegpt"
        if "instruction" in present and "prompt" not in present:
            return "alpaca"
        if "prompt" not in present:
            return "implicit"
        answers = (first_row["prompt"], first_row["chosen"], first_row["rejected"])
        return "text" if all(isinstance(value, str) for value in answers) else "conversation"
    raise DataError(
        f"not preference data: found the columns {', '.join(columns) or '(none)'}; accepted are\n{ACCEPTED}\nRename the columns and run again."
    )


def parse_row(row: dict[str, Any], data_format: str) -> Example | RowProblem:
    """The row's example, or what is wrong with it."""
    try:
        example = PARSERS[data_format](row)
    except _BadRow as problem:
        return RowProblem(str(problem))
    for name, content in (("prompt", example.prompt), ("chosen", example.chosen), ("rejected", example.rejected)):
        if not content:
            return RowProblem(f"`{name}` is empty")
    return example


def check_rows(rows: Iterable[dict[str, Any]], data_format: str) -> None:
    """Raise one `DataError` for all unusable rows: each reason with its count and first rows."""
    numbers: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    for number, row in enumerate(_decoded(rows)):
        problem = parse_row(row, data_format)
        if isinstance(problem, RowProblem):
            counts[problem.reason] += 1
            numbers.setdefault(problem.reason, []).append(number)
    if not counts:
        return
    lines = [
        f"  {reason}: {count} row{'s' if count > 1 else ''}, number {', '.join(map(str, numbers[reason][:5]))}{', …' if count > 5 else ''}"
        for reason, count in counts.most_common()
    ]
    total = sum(counts.values())
    raise DataError(
        f"{total} row{'s' if total > 1 else ''} cannot be used (rows are counted from 0, format {data_format}):\n"
        + "\n".join(lines)
        + "\nMend or remove them and run again; nothing was written."
    )


def _decoded(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(f"the data is not UTF-8 text ({error.reason}).\nConvert it to UTF-8 and run again; nothing was written.") from error


class _BadRow(Exception):
    pass


def _parse_text(row: dict[str, Any]) -> Example:
    return Example(_text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected"))


def _parse_conversation(row: dict[str, Any]) -> Example:
    prompt = row["prompt"]
    messages = [{"role": "user", "content": _text(row, "prompt")}] if isinstance(prompt, str) else _messages(row, "prompt")
    return Example(messages, _answer(row, "chosen", messages), _answer(row, "rejected", messages))


def _parse_implicit(row: dict[str, Any]) -> Example:
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        chosen_text, rejected_text = _text(row, "chosen"), _text(row, "rejected")
        cut = _shared_text(chosen_text, rejected_text)
        return Example(chosen_text[:cut], chosen_text[cut:], rejected_text[cut:])
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and shared == min(len(chosen), len(rejected)):
        shared -= 1  # one dialogue ends where the other goes on, or they are equal: the last turn is the answer
    return Example(chosen[:shared], chosen[shared:], rejected[shared:])


def _parse_sharegpt(row: dict[str, Any]) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise _BadRow("`conversations` is not a list of turns")
    prompt = [_sharegpt_turn(turn, "conversations") for turn in turns]
    return Example(prompt, [_sharegpt_turn(row["chosen"], "chosen")], [_sharegpt_turn(row["rejected"], "rejected")])


def _parse_alpaca(row: dict[str, Any]) -> Example:
    question = _text(row, "instruction")
    extra = row.get("input")
    if extra and not (isinstance(extra, str) and not extra.strip()):
        question += "\n\n" + _text(row, "input")
    return Example(
        [{"role": "user", "content": question}],
        [{"role": "assistant", "content": _text(row, "chosen")}],
        [{"role": "assistant", "content": _text(row, "rejected")}],
    )


PARSERS = {
    "text": _parse_text,
    "conversation": _parse_conversation,
    "implicit": _parse_implicit,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
}


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise _BadRow(f"`{name}` is {_kind(value)}, expected text")
    if not value.strip():
        raise _BadRow(f"`{name}` is empty")
    return value


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list):
        raise _BadRow(f"`{name}` is {_kind(value)}, expected messages")
    return [_message(message, name, "role", "content") for message in value]


def _message(message: Any, name: str, role_field: str, content_field: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get(role_field), str):
        raise _BadRow(f"`{name}` has a message without `{role_field}`")
    role, content = message[role_field], message.get(content_field)
    if not isinstance(content, str):
        raise _BadRow(f"`{name}` has a message whose `{content_field}` is {_kind(content)}, expected text")
    if not content.strip() and role != "system":
        raise _BadRow(f"`{name}` has a message whose `{content_field}` is empty")
    extras = {key: value for key, value in message.items() if key not in (role_field, content_field) and value is not None}
    return {**extras, "role": role, "content": content}


def _sharegpt_turn(turn: Any, name: str) -> Message:
    message = _message(turn, name, "from", "value")
    role = SHAREGPT_ROLES.get(message["role"])
    if role is None:
        raise _BadRow(f"`{name}` has a turn from {message['role']!r}, expected one of {', '.join(SHAREGPT_ROLES)}")
    return {**message, "role": role}


def _answer(row: dict[str, Any], name: str, prompt: list[Message]) -> list[Message]:
    """The answer's messages, without the prompt where they repeat it."""
    if isinstance(row[name], str):
        return [{"role": "assistant", "content": _text(row, name)}]
    messages = _messages(row, name)
    return messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the shared text, without a space at its end: the answers keep it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and shared == min(len(chosen), len(rejected)):
        return shared - 1  # one text ends where the other goes on: its last letter is the answer
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return shared


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
