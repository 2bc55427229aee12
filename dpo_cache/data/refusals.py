"""Why data is in no format: the error that names the reason and the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cache.data.columns import LISTS, find_first, find_responses, numbered_columns
from dpo_cache.data.compared import find_verdict
from dpo_cache.data.messages import BadRow
from dpo_cache.errors import DataError

ACCEPTED = """\
  prompt, chosen, rejected                    (text, or messages with role and content)
  chosen, rejected                            (whole dialogues that share the prompt)
  conversations, chosen, rejected             (ShareGPT: from and value)
  messages, chosen, rejected                  (the messages before the answers)
  messages, rejected_response                 (ms-swift: the last message is the chosen answer)
  instruction, input, chosen, rejected        (Alpaca)
  instruction, input, output                  (output: a list of the chosen and the rejected answer)
  system, question, chosen, rejected
  input, preferred_output, non_preferred_output   (OpenAI)
  prompt, responses, scores or ranks          (ranked answers)
  prompt, completions                         (objects with response, and score or rank)
  prompt, response_a, response_b, preference  (two answers, and which is better)"""

ONE_ANSWER = ("completion", "response", "answer", "output", "messages", "conversations", "text")
JUDGEMENTS = ("label", "labels", "kto_tag", "is_safe", "desirable", "score", "rating", "reward")


def refusal(columns: Sequence[str], first_row: dict[str, Any], place: str) -> DataError:
    """The error for data with these columns."""
    return DataError(
        _of_two_answers(columns, first_row, place)
        or _of_several_answers(columns, first_row, place)
        or _of_one_answer(columns, place)
        or f"{place} is not preference data: found the columns {', '.join(columns) or '(none)'}; accepted "
        f"are\n{ACCEPTED}\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question, or rename them."
    )


def _of_two_answers(columns: Sequence[str], first_row: dict[str, Any], place: str) -> str | None:
    found = find_responses(tuple(columns))
    if found is not None:
        try:
            find_verdict(first_row, found)
        except BadRow as problem:
            return f"{place}: {problem}.\nIt has the columns {', '.join(columns)}."
    stem, numbers = next(iter(numbered_columns(tuple(columns)).items()), ("", []))
    if len(numbers) > 2:
        names = ", ".join(stem + number for number in numbers)
        return (
            f"{place}: its answers are in {len(numbers)} columns ({names}), expected two.\n"
            "Put them into a list `responses`, with a list `scores` or `ranks`."
        )
    return None


def _of_several_answers(columns: Sequence[str], first_row: dict[str, Any], place: str) -> str | None:
    column = find_first(columns, LISTS)
    if column is None or not isinstance(first_row.get(column), list):
        return None
    return (
        f"{place}: nothing ranks the answers in `{column}`, expected a list `scores` or `ranks`, or answers "
        "that are objects with a score or rank.\n"
        f"It has the columns {', '.join(columns)}. Name one with `map`, for example `map` scores=ratings."
    )


def _of_one_answer(columns: Sequence[str], place: str) -> str | None:
    answer, judgement = (find_first(columns, names) for names in (ONE_ANSWER, JUDGEMENTS))
    if answer is None or judgement is None:
        return None
    return (
        f"{place} is not paired: a row has one answer (`{answer}`) and a judgement of it (`{judgement}`), as "
        "for KTO. DPO compares two answers to one prompt.\n"
        "Put two answers into a row, as `chosen` and `rejected`, or more, as lists `responses` and `scores`."
    )
