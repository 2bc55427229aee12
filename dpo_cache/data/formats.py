"""Preference data as people store it -> one shape: a prompt, its answers, and which is preferred to which.

A format is recognised from the columns and the type of their first value:

    text             prompt, chosen, rejected: strings
    conversation     prompt: string or messages; chosen, rejected: messages, with or without the prompt
                     repeated
    implicit         chosen, rejected: whole dialogues, as messages or text; the prompt is what they share
    sharegpt         conversations (from, value); chosen, rejected: one turn each; system: optional. A turn
                     from function_call is JSON, {"name": ..., "arguments": ...} or a list of these; one from
                     observation or tool is its result
    alpaca           instruction, input (may be missing or empty); chosen, rejected: strings; system, history:
                     optional
    question         question; chosen, rejected: strings; system: optional
    ranked           prompt; responses: a list of strings or of message lists; scores (higher is better) or
                     ranks (1 is best)

Messages are `{"role": ..., "content": ...}`. Everything but text goes through the chat template, to which a
column
`tools` (a list, or JSON) and a column `chat_template_kwargs` (an object) are handed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cache.errors import DataError

Message = dict[str, Any]
Content = str | list[Message]

# Columns that a format needs, in the order in which formats are tried; text and conversation differ by their
# values.
NEEDED = {
    "sharegpt": ("conversations", "chosen", "rejected"),
    "text": ("prompt", "chosen", "rejected"),
    "conversation": ("prompt", "chosen", "rejected"),
    "alpaca": ("instruction", "chosen", "rejected"),
    "question": ("question", "chosen", "rejected"),
    "implicit": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
}

ACCEPTED = """\
  prompt, chosen, rejected                    (text, or messages with role and content)
  chosen, rejected                            (whole dialogues that share the prompt)
  conversations, chosen, rejected             (ShareGPT: from and value)
  instruction, input, chosen, rejected        (Alpaca)
  system, question, chosen, rejected
  prompt, responses, scores or ranks          (ranked answers)"""

SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One row: a prompt and its answers, all text or all messages, and the pairs among the answers."""

    prompt: Content
    answers: tuple[Content, ...]
    pairs: tuple[tuple[int, int], ...] = (
        (0, 1),
    )  # (chosen, rejected), as places among the answers; none if all rank alike
    template_options: dict[str, Any] = field(default_factory=dict)  # what the row hands to the chat template

    @property
    def is_text(self) -> bool:
        """Whether it is tokenized as it stands; else through the chat template."""
        return isinstance(self.prompt, str)


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used, in words that complete 'row 7: ...'."""

    reason: str


def detect_format(columns: Sequence[str], first_row: dict[str, Any], place: str = "the data") -> str:
    """The format's name. Raises `DataError` naming the columns found and those accepted."""
    for name, needed in NEEDED.items():
        if set(needed) <= set(columns):
            if name != "text":
                return name
            return "conversation" if any(isinstance(first_row[column], list) for column in needed) else "text"
    raise DataError(
        f"{place} is not preference data: found the columns {', '.join(columns) or '(none)'}; accepted "
        f"are\n{ACCEPTED}\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question, or rename them."
    )


def check_format(name: str, columns: Sequence[str], place: str = "the data") -> str:
    """The format that the user named, if the columns it needs are there; else `DataError`."""
    missing = [column for column in NEEDED[name] if column not in columns]
    if missing:
        raise DataError(
            f"`format` {name} needs the columns {', '.join(NEEDED[name])}; {place} has no "
            f"{', '.join(missing)}, but {', '.join(columns)}.\n"
            "Name the columns that correspond with `map`, for example `map` prompt=question."
        )
    return name


def parse_row(row: dict[str, Any], data_format: str, ranked_pairs: str = "all") -> Example | RowProblem:
    """The row's example, or what is wrong with it. `ranked_pairs`: all pairs of ranked answers, or the best
    against each.
    """
    try:
        prompt, answers, pairs = (
            _parse_ranked(row, ranked_pairs)
            if data_format == "ranked"
            else (*PARSERS[data_format](row), ((0, 1),))
        )
        options = {} if isinstance(prompt, str) else _template_options(row)
    except _BadRow as problem:
        return RowProblem(str(problem))
    names = ("chosen", "rejected") if data_format != "ranked" else ("responses",) * len(answers)
    for name, content in (("prompt", prompt), *zip(names, answers, strict=True)):
        if not content:
            return RowProblem(f"`{name}` is empty")
    return Example(prompt, answers, pairs, options)


class _BadRow(Exception):
    pass


Parsed = tuple[Content, tuple[Content, ...]]


def _parse_text(row: dict[str, Any]) -> Parsed:
    return _text(row, "prompt"), (_text(row, "chosen"), _text(row, "rejected"))


def _parse_conversation(row: dict[str, Any]) -> Parsed:
    prompt = _prompt_messages(row)
    return prompt, (_answer(row, "chosen", prompt), _answer(row, "rejected", prompt))


def _parse_implicit(row: dict[str, Any]) -> Parsed:
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        chosen_text, rejected_text = _text(row, "chosen"), _text(row, "rejected")
        cut = _shared_text(chosen_text, rejected_text)
        return chosen_text[:cut], (chosen_text[cut:], rejected_text[cut:])
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and shared == min(len(chosen), len(rejected)):
        shared -= (
            1  # one dialogue ends where the other goes on, or they are equal: the last turn is the answer
        )
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _parse_sharegpt(row: dict[str, Any]) -> Parsed:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise _BadRow("`conversations` is not a list of turns")
    prompt = [*_system(row), *(_sharegpt_turn(turn, "conversations") for turn in turns)]
    if turns and prompt[-1]["role"] == "assistant":
        raise _BadRow(
            f"`conversations` ends with a turn from {turns[-1]['from']!r}, expected what the answers reply to"
        )
    return prompt, (_sharegpt_answer(row, "chosen"), _sharegpt_answer(row, "rejected"))


def _parse_alpaca(row: dict[str, Any]) -> Parsed:
    question = _text(row, "instruction")
    extra = row.get("input")
    if extra and not (isinstance(extra, str) and not extra.strip()):
        question += "\n\n" + _text(row, "input")
    return [*_system(row), *_history(row), _user(question)], (
        _assistant(row, "chosen"),
        _assistant(row, "rejected"),
    )


def _parse_question(row: dict[str, Any]) -> Parsed:
    return [*_system(row), _user(_text(row, "question"))], (
        _assistant(row, "chosen"),
        _assistant(row, "rejected"),
    )


def _parse_ranked(
    row: dict[str, Any], ranked_pairs: str
) -> tuple[Content, tuple[Content, ...], tuple[tuple[int, int], ...]]:
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise _BadRow("`responses` is not a list of two answers or more")
    merits = _merits(row, len(responses))
    order = sorted(range(len(responses)), key=lambda place: -merits[place])
    better = (
        order if ranked_pairs == "all" else [place for place in order if merits[place] == merits[order[0]]]
    )
    pairs = tuple((one, other) for one in better for other in order if merits[one] > merits[other])
    rows = [{"responses": response} for response in responses]
    if isinstance(row["prompt"], str) and all(isinstance(response, str) for response in responses):
        return _text(row, "prompt"), tuple(_text(entry, "responses") for entry in rows), pairs
    prompt = _prompt_messages(row)
    return prompt, tuple(_answer(entry, "responses", prompt) for entry in rows), pairs


PARSERS = {
    "text": _parse_text,
    "conversation": _parse_conversation,
    "implicit": _parse_implicit,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "question": _parse_question,
}


def _merits(row: dict[str, Any], num_responses: int) -> list[float]:
    """One number an answer, the higher the better."""
    name, sign = ("scores", 1.0) if row.get("scores") is not None else ("ranks", -1.0)
    values = row.get(name)
    if values is None:
        raise _BadRow("it has neither `scores` nor `ranks`")
    if not isinstance(values, list):
        raise _BadRow(f"`{name}` is {_kind(values)}, expected a list of numbers")
    wrong = [value for value in values if not isinstance(value, (int, float)) or value != value]
    if wrong:
        raise _BadRow(
            f"`{name}` holds "
            f"{'null' if wrong[0] is None else 'NaN' if wrong[0] != wrong[0] else _kind(wrong[0])}, "
            "expected numbers"
        )
    if len(values) != num_responses:
        raise _BadRow(f"`{name}` has {len(values)} numbers for {num_responses} responses")
    return [sign * value for value in values]


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` hand to the chat template."""
    options: dict[str, Any] = {}
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise _BadRow("`tools` is not JSON") from error
    if tools:
        options["tools"] = tools
    extra = row.get("chat_template_kwargs") or {}
    if not isinstance(extra, dict):
        raise _BadRow(f"`chat_template_kwargs` is {_kind(extra)}, expected an object")
    return {**options, **extra}


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise _BadRow(f"`{name}` is {_kind(value)}, expected text")
    if not value.strip():
        raise _BadRow(f"`{name}` is empty")
    return value


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(row: dict[str, Any], name: str) -> list[Message]:
    return [{"role": "assistant", "content": _text(row, name)}]


def _system(row: dict[str, Any]) -> list[Message]:
    """The system message, where the row has one."""
    system = row.get("system")
    return (
        []
        if system is None or (isinstance(system, str) and not system.strip())
        else [{"role": "system", "content": _text(row, "system")}]
    )


def _history(row: dict[str, Any]) -> list[Message]:
    """Earlier turns: a list of [question, answer]."""
    turns = row.get("history") or []
    if not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise _BadRow("`history` is not a list of [question, answer]")
    return [
        message
        for question, answer in turns
        for message in (_user(question), {"role": "assistant", "content": answer})
    ]


def _prompt_messages(row: dict[str, Any]) -> list[Message]:
    messages = [_user(_text(row, "prompt"))] if isinstance(row["prompt"], str) else _messages(row, "prompt")
    return (
        messages
        if messages and messages[0]["role"] == "system"
        else [*_system(row), *messages]
        if messages
        else []
    )


def _messages(row: dict[str, Any], name: str) -> list[Message]:
    value = row[name]
    if not isinstance(value, list):
        raise _BadRow(f"`{name}` is {_kind(value)}, expected messages")
    return [_message(message, name, "role", "content") for message in value]


def _message(message: Any, name: str, role_field: str, content_field: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get(role_field), str):
        raise _BadRow(f"`{name}` has a message without `{role_field}`")
    role, content = message[role_field], message.get(content_field)
    extras = {
        key: value
        for key, value in message.items()
        if key not in (role_field, content_field) and value is not None
    }
    if content is None and extras.get("tool_calls"):
        content = ""
    elif not isinstance(content, str):
        raise _BadRow(f"`{name}` has a message whose `{content_field}` is {_kind(content)}, expected text")
    elif not content.strip() and role != "system" and not extras.get("tool_calls"):
        raise _BadRow(f"`{name}` has a message whose `{content_field}` is empty")
    return {**extras, "role": role, "content": content}


def _sharegpt_turn(turn: Any, name: str) -> Message:
    message = _message(turn, name, "from", "value")
    role = SHAREGPT_ROLES.get(message["role"])
    if role is None:
        raise _BadRow(
            f"`{name}` has a turn from {message['role']!r}, expected one of {', '.join(SHAREGPT_ROLES)}"
        )
    if message["role"] == "function_call":
        return {**message, "role": role, "content": "", "tool_calls": _tool_calls(message["content"], name)}
    return {**message, "role": role}


def _sharegpt_answer(row: dict[str, Any], name: str) -> list[Message]:
    answer = _sharegpt_turn(row[name], name)
    if answer["role"] != "assistant":
        raise _BadRow(
            f"`{name}` is a turn from {row[name]['from']!r}, expected one from gpt or function_call"
        )
    return [answer]


def _tool_calls(value: str, name: str) -> list[dict[str, Any]]:
    """Calls as chat templates read them, of the JSON that a ShareGPT turn holds."""
    try:
        found = json.loads(value)
        calls = [
            {"name": call["name"], "arguments": call["arguments"]}
            for call in (found if isinstance(found, list) else [found])
        ]
        calls = [{**call, "arguments": _parsed(call["arguments"])} for call in calls]
    except (ValueError, KeyError, TypeError):
        calls = []
    if not calls or not all(
        call["name"] and isinstance(call["name"], str) and isinstance(call["arguments"], dict)
        for call in calls
    ):
        raise _BadRow(
            f"`{name}` has a turn from 'function_call' that is no JSON object with `name` and "
            "`arguments`, nor a list of these"
        )
    return [{"type": "function", "function": call} for call in calls]


def _parsed(arguments: Any) -> Any:
    """Arguments are an object, or JSON of one."""
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _answer(row: dict[str, Any], name: str, prompt: list[Message]) -> list[Message]:
    """The answer's messages, without the prompt where they repeat it."""
    if isinstance(row[name], str):
        return _assistant(row, name)
    messages = _messages(row, name)
    if [_bare(message) for message in messages[: len(prompt)]] == [_bare(message) for message in prompt]:
        messages = messages[len(prompt) :]
    if messages and messages[0]["role"] in ("user", "system"):
        raise _BadRow(
            f"`{name}` starts with a message from {messages[0]['role']}, expected the answer, or the "
            "whole prompt before it"
        )
    return messages


def _bare(message: Message) -> Message:
    """The message without spaces around it, to be compared."""
    return {**message, "content": message["content"].strip()}


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


def unused_columns(data_format: str, columns: Sequence[str], first_row: dict[str, Any]) -> list[str]:
    """Columns that mean something in other formats, or to a chat template, and nothing to rows like the
    first.
    """
    example = parse_row({**dict.fromkeys(columns), **first_row}, data_format)
    used = {"alpaca": {"system", "history"}, "implicit": set()}.get(data_format, {"system"}) | {
        "tools",
        "chat_template_kwargs",
    }
    if isinstance(example, Example) and example.is_text:
        used = set()
    return [
        name
        for name in ("system", "history", "tools", "chat_template_kwargs")
        if name in columns and name not in used
    ]


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
