"""The columns that hold prompt and answers, under each name that public data sets give them.

Where a row has several of these columns, the first in these lists counts.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from functools import lru_cache
from typing import NamedTuple

# One user turn, in a prompt that the chat template renders
QUESTIONS = ("question", "query", "problem", "user_prompt", "user_input", "input")
# Messages to answer; `context` only where it holds messages
DIALOGUES = ("messages", "prompt_messages", "context")
PROMPTS = ("conversations", "prompt", *DIALOGUES, "instruction", *QUESTIONS, "history")

# Other names of the column `system`
SYSTEMS = ("system_prompt", "system_message", "sys_prompt", "system_instruction")

# The chosen answer, and the rejected one
SIDES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("answer_chosen", "answer_rejected"),
    ("chosen_completion", "rejected_completion"),
    ("chosen_output", "rejected_output"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_response", "dispreferred_response"),
    ("preferred_response", "rejected_response"),
    ("preferred", "dispreferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("better_response", "worse_response"),
    ("better", "worse"),
    ("win_response", "lose_response"),
    ("win", "lose"),
    ("good_response", "bad_response"),
    ("response_j", "response_k"),  # stack-exchange-paired: j is the better one
    ("response", "rejected_response"),
    ("answer", "rejected_answer"),
    ("output", "rejected_output"),
)

# Dialogues that end with the chosen answer
ANSWERED = ("messages", "conversations", "conversation")

# Several answers in one column
LISTS = (
    "responses", "completions", "generations", "answers", "candidates", "outputs", "samples",
    "responses_and_scores",
)  # fmt: skip
SCORES = ("scores", "ratings", "rewards")  # the higher the better
RANKS = ("ranks",)  # the lower the better

# Two answers, neither named the better one: their numbers or letters
STEMS = (
    "response", "output", "answer", "completion", "generation", "candidate", "summary", "reply",
    "conversation", "conv", "human_ref",
)  # fmt: skip
NUMBERS = (("a", "b"), ("0", "1"), ("1", "2"), ("A", "B"))
RESPONSES = tuple(
    (f"{stem}{separator}{one}", f"{stem}{separator}{other}")
    for stem in STEMS
    for separator in ("_", "")
    for one, other in NUMBERS
)


class Responses(NamedTuple):
    """The columns of two answers, and their numbers or letters."""

    columns: tuple[str, str]
    numbers: tuple[str, str]


def find_sides(columns: Container[str]) -> tuple[str, str]:
    """The columns of the chosen and the rejected answer; where one is missing, those that have the other."""
    whole = (pair for pair in SIDES if pair[0] in columns and pair[1] in columns)
    half = (pair for pair in SIDES if pair[0] in columns or pair[1] in columns)
    return next(whole, None) or next(half, SIDES[0])


def find_first(columns: Container[str], names: Iterable[str]) -> str | None:
    """The first of these names that is a column."""
    return next((name for name in names if name in columns), None)


@lru_cache(maxsize=64)
def numbered_columns(columns: tuple[str, ...]) -> dict[str, list[str]]:
    """Numbers or letters of the answers that have a column each, by the start of the columns' names."""
    found: dict[str, list[str]] = {}
    for name in columns:
        match = re.fullmatch(rf"((?:{'|'.join(STEMS)})_?)(\d+|[a-zA-Z])", name)
        if match:
            found.setdefault(match[1], []).append(match[2])
    return {stem: sorted(numbers) for stem, numbers in found.items() if len(numbers) > 1}


def find_responses(columns: tuple[str, ...]) -> Responses | None:
    """The columns of exactly two answers, neither of which is named the better one."""
    found = numbered_columns(columns)
    for stem in (stem + separator for stem in STEMS for separator in ("_", "")):
        numbers = tuple(found.get(stem, ()))
        if numbers in NUMBERS:
            return Responses((stem + numbers[0], stem + numbers[1]), numbers)
    return None
