"""Rows that name their chosen answer and their rejected one, as the formats in `formats.py`."""

from __future__ import annotations

from dpo_cache.data.columns import ANSWERED, find_first, find_sides
from dpo_cache.data.messages import BadRow, describe, read_messages, read_prompt, read_text
from dpo_cache.data.parsed import Parsed, split_texts
from dpo_cache.data.prompts import (
    Row,
    read_dialogue_prompt,
    read_instruction,
    read_prompt_and_answers,
    read_question,
    read_reply,
    read_sharegpt_prompt,
    read_sharegpt_reply,
    with_sides,
    with_system,
)


def parse_text(row: Row) -> Parsed:
    return with_sides(row, read_text(row, "prompt"), read_text)


def parse_conversation(row: Row) -> Parsed:
    return with_sides(row, read_prompt(row), read_reply)


def parse_implicit(row: Row) -> Parsed:
    return dialogues(row, find_sides(row))


def dialogues(row: Row, columns: tuple[str, str]) -> Parsed:
    """Two whole dialogues of which the prompt is what they share: text, or messages without a prompt."""
    if any(isinstance(row[column], str) for column in columns):
        return Parsed(*split_texts(*(read_text(row, column) for column in columns)), columns)
    return Parsed([], tuple(read_messages(row, column) for column in columns), columns)


def parse_sharegpt(row: Row) -> Parsed:
    return with_sides(row, read_sharegpt_prompt(row), read_sharegpt_reply)


def parse_alpaca(row: Row) -> Parsed:
    return with_sides(row, read_instruction(row), read_reply)


def parse_question(row: Row) -> Parsed:
    return with_sides(row, read_question(row), read_reply)


def parse_messages(row: Row) -> Parsed:
    return with_sides(row, read_dialogue_prompt(row), read_reply)


def parse_swift(row: Row) -> Parsed:
    """The chosen answer is the last message; the rejected one is text, or the end of another dialogue."""
    column = find_first(row, ANSWERED) or ANSWERED[0]
    messages = with_system(row, read_messages(row, column))
    if not messages or messages[-1]["role"] != "assistant":
        last = f"a message from {messages[-1]['role']}" if messages else "nothing"
        raise BadRow(f"`{column}` ends with {last}, expected the chosen answer, from assistant")
    if row.get("rejected_messages") is None:
        given = {column: messages[-1:], "rejected_response": row.get("rejected_response")}
        return with_sides(given, messages[:-1], read_reply, (column, "rejected_response"))
    rejected = read_messages(row, "rejected_messages")
    if rejected and rejected[0]["role"] != "assistant":
        return Parsed([], (messages, with_system(row, rejected)), (column, "rejected_messages"))
    return Parsed(messages[:-1], (messages[-1:], rejected), (column, "rejected_messages"))


def parse_openai(row: Row) -> Parsed:
    given = row["input"] if isinstance(row["input"], dict) else {"messages": row["input"]}
    prompt = read_messages({"input": given.get("messages")}, "input")
    parsed = with_sides(row, prompt, read_reply, ("preferred_output", "non_preferred_output"))
    return parsed._replace(tools=given.get("tools"))


def parse_output(row: Row) -> Parsed:
    """`output` holds the chosen answer and the rejected one."""
    outputs = row["output"]
    if not isinstance(outputs, list) or len(outputs) != 2:
        found = f"{len(outputs)} answers" if isinstance(outputs, list) else describe(outputs)
        raise BadRow(f"`output` is {found}, expected a list of two: the chosen answer and the rejected one")
    contents = read_prompt_and_answers(row, [("output", answer) for answer in outputs])
    return Parsed(*contents, ("output", "output"))
