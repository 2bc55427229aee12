"""A row's prompt, in whichever column it is, and answers as messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from dpo_cache.data.columns import DIALOGUES, PROMPTS, QUESTIONS, SYSTEMS, find_first, find_sides
from dpo_cache.data.fields import is_null
from dpo_cache.data.messages import (
    BadRow,
    Message,
    is_blank,
    read_history,
    read_messages,
    read_prompt,
    read_sharegpt_answer,
    read_sharegpt_turn,
    read_system,
    read_text,
)
from dpo_cache.data.parsed import Content, Parsed
from dpo_cache.data.roles import standard_role
from dpo_cache.data.serialized import CALL_KEYS, find_messages

Row = dict[str, Any]

# keys of an answer that is an object
ANSWER_FIELDS = ("response", "completion", "answer", "text", "generation", "output", "content")


def find_prompt(row: Row) -> str | None:
    """The column that holds the prompt. `context` counts only where it holds messages."""
    return find_first(row, (name for name in PROMPTS if name != "context" or is_list(row.get(name))))


def read_any_prompt(row: Row) -> Content:
    """The prompt: text where the column `prompt` is text, messages otherwise."""
    column = find_prompt(row)
    if column is None:
        raise BadRow(f"it has no prompt, expected one of {', '.join(PROMPTS)}")
    if column == "conversations":
        return read_sharegpt_prompt(row)
    if column == "prompt":
        return read_text(row, "prompt") if isinstance(row["prompt"], str) else read_prompt(row)
    if column in DIALOGUES:
        return read_dialogue_prompt(row)
    return read_instruction(row) if column == "instruction" else read_question(row, column)


def read_sharegpt_prompt(row: Row) -> list[Message]:
    turns = row["conversations"]
    turns = turns if isinstance(turns, list) else find_messages(turns)
    if turns is None:
        raise BadRow("`conversations` is not a list of turns")
    prompt = [read_sharegpt_turn(turn, "conversations") for turn in turns]
    if prompt and prompt[-1]["role"] == "assistant":
        if not _is_chosen(prompt[-1], row):
            last = sender(turns[-1])
            raise BadRow(
                f"`conversations` ends with a turn from {last!r}, expected the message that the answers "
                "reply to"
            )
        prompt = prompt[:-1]
    return with_system(row, prompt)


def read_dialogue_prompt(row: Row) -> list[Message]:
    """Messages to answer. Where they end with the chosen answer, it is left out."""
    return _read_dialogue(row, find_first(row, DIALOGUES) or DIALOGUES[0])


def _read_dialogue(row: Row, column: str) -> list[Message]:
    prompt = read_messages(row, column)
    if prompt and prompt[-1]["role"] == "assistant":
        if not _is_chosen(prompt[-1], row):
            raise BadRow(
                f"`{column}` ends with a message from assistant, expected the message that the answers "
                "reply to"
            )
        prompt = prompt[:-1]
    return with_system(row, prompt)


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the column `system`, unless they begin with a system message."""
    return messages if messages and messages[0]["role"] == "system" else [*read_system(row), *messages]


def with_system_column(row: Row) -> Row:
    """The row with a column `system` where it has text under another name, such as `system_prompt`."""
    name = next((name for name in SYSTEMS if name in row and not is_blank(row[name])), None)
    if name is None or not is_blank(row.get("system")) or not isinstance(row[name], str):
        return row
    found = copy(row)  # keeps the row's class, which answers for missing columns
    found["system"] = row[name]
    return found


def read_instruction(row: Row) -> list[Message]:
    """The prompt of Alpaca's columns: earlier turns, and an instruction with its input."""
    if find_messages(row["instruction"]) is not None:
        if not is_blank(row.get("input")):
            raise BadRow("`input` is next to messages in `instruction`, expected text in `instruction`")
        return _after_history(row, _read_dialogue(row, "instruction"))
    question = read_text(row, "instruction")
    if row.get("input") and not is_blank(row["input"]):
        question += "\n\n" + read_text(row, "input")
    return [*read_system(row), *read_history(row), {"role": "user", "content": question}]


def read_question(row: Row, column: str | None = None) -> list[Message]:
    column = column or find_first(row, QUESTIONS) or QUESTIONS[0]
    question = row.get(column)
    if column != "history" and find_messages(question) is not None:
        return _after_history(row, _read_dialogue(row, column))
    if isinstance(question, dict):  # webgpt_comparisons
        row = {**row, column: question.get("full_text")}
    earlier = [] if column == "history" else read_history(row)
    return [*read_system(row), *earlier, {"role": "user", "content": read_text(row, column)}]


def _after_history(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the column `history`, which comes after their system message."""
    is_system = bool(messages) and messages[0]["role"] == "system"
    return [*messages[:is_system], *read_history(row), *messages[is_system:]]


def read_reply(row: Row, column: str) -> list[Message]:
    """An answer: text, a message, or messages that may repeat the prompt."""
    if isinstance(row[column], str):
        return [{"role": "assistant", "content": read_text(row, column)}]
    return read_messages(row, column)


def read_sharegpt_reply(row: Row, column: str) -> list[Message]:
    """The same, from turns with `from` and `value`."""
    if isinstance(row[column], dict):
        return read_sharegpt_answer(row, column)
    return read_reply(row, column)


def read_prompt_and_answers(
    row: Row, answers: Sequence[tuple[str, Any]]
) -> tuple[Content, tuple[Content, ...]]:
    """The prompt and the answers (each a column's name and a value): all text, or all messages."""
    is_text = all(isinstance(value, str) for _, value in answers)
    prompt = [] if find_prompt(row) is None and not is_text else read_any_prompt(row)
    if isinstance(prompt, str) and is_text:
        return prompt, tuple(read_text({column: value}, column) for column, value in answers)
    if isinstance(prompt, str):
        prompt = read_prompt(row)
    return prompt, tuple(read_reply({column: value}, column) for column, value in answers)


def with_sides(
    row: Row, prompt: Content, read: Callable[[Row, str], Content], columns: tuple[str, str] | None = None
) -> Parsed:
    """The chosen answer and the rejected one, or each pair of several of them."""
    columns = columns or find_sides(row)
    one, other = (row[column] for column in columns)
    if isinstance(one, str) and isinstance(other, str):
        return Parsed(prompt, (read(row, columns[0]), read(row, columns[1])), columns)
    is_single = _is_single(one) or _is_single(other)  # so replies one after the other are several answers
    chosen, rejected = (_read_answers(row, column, read, is_single) for column in columns)
    if len(chosen) == len(rejected) == 1:
        return Parsed(prompt, (chosen[0], rejected[0]), columns)
    pairs = tuple((one, len(chosen) + other) for one in range(len(chosen)) for other in range(len(rejected)))
    names = (columns[0],) * len(chosen) + (columns[1],) * len(rejected)
    return Parsed(prompt, (*chosen, *rejected), names, pairs)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def is_whole_dialogue(value: Any) -> bool:
    """Return whether a column holds messages that begin with a turn that no answer begins with."""
    messages = find_messages(value)
    return messages is not None and standard_role(sender(messages[0])) in ("user", "system", "developer")


def is_several(value: Any) -> bool:
    """Return whether a column holds a list of answers: texts, or lists of messages."""
    if not isinstance(value, list) or not value or not isinstance(value[0], (str, list)):
        return False
    return all(isinstance(item, (str, list)) for item in value)


def bare_answer(value: Any) -> Any:
    """The text of an answer that is an object without a role, such as `{"answer": "4.", "rank": 1}`."""
    if not isinstance(value, dict) or any(value.get(name) is not None for name in ("role", "from")):
        return value
    field = next((name for name in ANSWER_FIELDS if isinstance(value.get(name), str)), None)
    return value if field is None else value[field]


def _read_answers(
    row: Row, column: str, read: Callable[[Row, str], Content], is_single: bool
) -> list[Content]:
    value = row[column]
    if is_single and isinstance(value, list) and len(value) > 1 and all(map(_is_reply, value)):
        return [read({column: bare_answer(answer)}, column) for answer in value]
    if isinstance(value, dict):
        return [read({column: bare_answer(value)}, column)]
    if is_several(value):
        return [read({column: answer}, column) for answer in value]
    return [read(row, column)]


def sender(turn: Row) -> str:
    """The role of a message, as the row has it."""
    return str(turn.get("role") or turn.get("from"))


def _is_reply(value: Any) -> bool:
    """Return whether it is an answer that is an object: a message from the assistant that calls no tool, or
    text in an object, which is no content part.
    """
    if not isinstance(value, dict) or any(value.get(calls) for calls in CALL_KEYS):
        return False
    is_text = isinstance(bare_answer(value), str) and "type" not in value
    return is_text or standard_role(sender(value)) == "assistant"


def _is_single(value: Any) -> bool:
    """Return whether a column holds one reply: text, an object, or messages of which one is from the
    assistant.
    """
    if not isinstance(value, list):
        return isinstance(value, (str, dict))
    senders = [standard_role(sender(turn)) for turn in value if isinstance(turn, dict)]
    return len(senders) == len(value) and senders.count("assistant") == 1


def _is_chosen(message: Message, row: Row) -> bool:
    """Return whether a message is the row's chosen answer."""
    column = find_sides(row)[0]
    value = row.get(column)
    return not is_null(value) and not is_several(value) and read_reply(row, column) == [message]
