"""Rows of every format -> one shape: a prompt, its answers, and which answer is preferred to which.

`formats.py` lists the formats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_cache.data.messages import (
    BadRow,
    Message,
    describe,
    is_blank,
    read_answer,
    read_history,
    read_messages,
    read_prompt,
    read_sharegpt_answer,
    read_sharegpt_turn,
    read_system,
    read_text,
)

Content = str | list[Message]
Answers = tuple[Content, ...]
Pairs = tuple[tuple[int, int], ...]  # (chosen, rejected), as positions among the answers
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Example:
    """One row: a prompt and its answers, all text or all messages, and the pairs among the answers."""

    prompt: Content
    answers: Answers
    pairs: Pairs = ((0, 1),)  # none if all answers rank alike
    template_options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the chat template
    notes: tuple[str, ...] = ()  # what happened to the row and is worth a remark, such as what it lost

    @property
    def is_text(self) -> bool:
        """Whether the tokenizer gets the text as it is, not rendered by the chat template."""
        return isinstance(self.prompt, str)


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used, in words that complete 'row 7: ...'."""

    reason: str


def parse_row(row: dict[str, Any], data_format: str, ranked_pairs: str = "all") -> Example | RowProblem:
    """The row's example, or the problem with the row.

    `ranked_pairs`: pair each of the ranked answers with each lower one (all), or only the best (best).
    """
    pairs: Pairs = ((0, 1),)
    names: Sequence[str] = SIDES
    try:
        if data_format == "ranked":
            prompt, answers, pairs = _parse_ranked(row, ranked_pairs)
            names = ("responses",) * len(answers)
        else:
            prompt, answers = PARSERS[data_format](row)
        options = {} if isinstance(prompt, str) else _template_options(row)
    except BadRow as problem:
        return RowProblem(str(problem))
    for name, content in (("prompt", prompt), *zip(names, answers, strict=True)):
        if not content:
            return RowProblem(f"`{name}` is empty")
    return Example(prompt, answers, pairs, options)


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of items at the start that two sequences share."""
    if other[: len(one)] == one:
        return len(one)
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, len(other))


def _parse_text(row: dict[str, Any]) -> tuple[Content, Answers]:
    return read_text(row, "prompt"), tuple(read_text(row, side) for side in SIDES)


def _parse_conversation(row: dict[str, Any]) -> tuple[Content, Answers]:
    prompt = read_prompt(row)
    return prompt, tuple(read_answer(row, side, prompt) for side in SIDES)


def _parse_implicit(row: dict[str, Any]) -> tuple[Content, Answers]:
    read = read_text if any(isinstance(row[side], str) for side in SIDES) else read_messages
    chosen, rejected = read(row, "chosen"), read(row, "rejected")
    shared = shared_prefix(chosen, rejected)
    # Where one dialogue continues the other, or both are equal, the last turn or letter is the answer.
    # Answers that are text keep the space before them.
    if shared and (shared == min(len(chosen), len(rejected)) or chosen[shared - 1] == " "):
        shared -= 1
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _parse_sharegpt(row: dict[str, Any]) -> tuple[Content, Answers]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRow("`conversations` is not a list of turns")
    prompt = [*read_system(row), *(read_sharegpt_turn(turn, "conversations") for turn in turns)]
    if turns and prompt[-1]["role"] == "assistant":
        raise BadRow(
            f"`conversations` ends with a turn from {turns[-1]['from']!r}, expected what the answers reply to"
        )
    return prompt, tuple(read_sharegpt_answer(row, side) for side in SIDES)


def _parse_alpaca(row: dict[str, Any]) -> tuple[Content, Answers]:
    question = read_text(row, "instruction")
    if row.get("input") and not is_blank(row["input"]):
        question += "\n\n" + read_text(row, "input")
    prompt = [*read_system(row), *read_history(row), {"role": "user", "content": question}]
    return prompt, _text_answers(row)


def _parse_question(row: dict[str, Any]) -> tuple[Content, Answers]:
    prompt = [*read_system(row), {"role": "user", "content": read_text(row, "question")}]
    return prompt, _text_answers(row)


PARSERS = {
    "text": _parse_text,
    "conversation": _parse_conversation,
    "implicit": _parse_implicit,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "question": _parse_question,
}


def _parse_ranked(row: dict[str, Any], ranked_pairs: str) -> tuple[Content, Answers, Pairs]:
    responses = row["responses"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRow("`responses` is not a list of two answers or more")
    merits = _merits(row, len(responses))
    order = sorted(range(len(responses)), key=lambda place: -merits[place])
    better = [place for place in order if ranked_pairs == "all" or merits[place] == merits[order[0]]]
    pairs = tuple((one, other) for one in better for other in order if merits[one] > merits[other])
    rows = [{"responses": response} for response in responses]
    if isinstance(row["prompt"], str) and all(isinstance(response, str) for response in responses):
        return read_text(row, "prompt"), tuple(read_text(entry, "responses") for entry in rows), pairs
    prompt = read_prompt(row)
    return prompt, tuple(read_answer(entry, "responses", prompt) for entry in rows), pairs


def _merits(row: dict[str, Any], num_responses: int) -> list[float]:
    """One number for each answer, the higher the better."""
    name, sign = ("scores", 1.0) if row.get("scores") is not None else ("ranks", -1.0)
    values = row.get(name)
    if values is None:
        raise BadRow("it has neither `scores` nor `ranks`")
    if not isinstance(values, list):
        raise BadRow(f"`{name}` is {describe(values)}, expected a list of numbers")
    for value in values:
        if not isinstance(value, (int, float)) or value != value:
            wrong = "null" if value is None else "NaN" if value != value else describe(value)
            raise BadRow(f"`{name}` holds {wrong}, expected numbers")
    if len(values) != num_responses:
        raise BadRow(f"`{name}` has {len(values)} numbers for {num_responses} responses")
    return [sign * value for value in values]


def _text_answers(row: dict[str, Any]) -> Answers:
    return tuple([{"role": "assistant", "content": read_text(row, side)}] for side in SIDES)


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the chat template from the columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise BadRow("`tools` is not JSON") from error
    extra = row.get("chat_template_kwargs") or {}
    if not isinstance(extra, dict):
        raise BadRow(f"`chat_template_kwargs` is {describe(extra)}, expected an object")
    return {**({"tools": tools} if tools else {}), **extra}
