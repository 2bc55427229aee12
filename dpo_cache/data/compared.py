"""Rows of two answers in columns that are numbered or lettered, and a verdict about them."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from dpo_cache.data.columns import LISTS, Responses, find_first, find_responses
from dpo_cache.data.messages import BadRow, Message, describe
from dpo_cache.data.parsed import Pairs, Parsed
from dpo_cache.data.prompts import Row, find_prompt, is_list, read_prompt_and_answers
from dpo_cache.data.two_sides import dialogues

# Columns whose value is the number, the letter or the model of the better answer. Where a row has several,
# `preference` counts, so that `map` can choose one.
NAMED = (
    "preference", "better_response_id", "safer_response_id", "preferred_response_id", "chosen_response_id",
    "best_response_id", "preferred_id", "better_id", "winner_id", "chosen_id", "winner", "preferred",
    "better", "preferred_response", "better_response", "best_response", "preferred_answer", "better_answer",
    "choice", "chosen",
)  # fmt: skip
SIGNED = ("overall_preference", "preference_strength")  # HelpSteer 2 and 3: below zero, the first is better
SCORES = ("score_{number}", "rating_{number}", "{column}_score", "{column}_rating", "{column}_reward")
KINDS = ("model", "assistant", "response", "answer")
TIES = frozenset(("tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "both", "equal", "same", "draw"))


class Verdict(NamedTuple):
    """How the columns of a row name the better of its two answers."""

    kind: str  # named, signed, shp, flags or scores
    columns: tuple[str, ...]


def parse_compared(row: Row) -> Parsed:
    found = find_pair(row)
    if found is None:
        raise BadRow("it does not have two answers, such as response_a and response_b")
    place = _better(row, found, find_verdict(row, found))
    pairs: Pairs = () if place is None else ((place, 1 - place),)
    if len({*found.columns}) == 1:  # a list of two
        (column, _) = found.columns
        answers = [(column, answer) for answer in row[column]]
        return Parsed(*read_prompt_and_answers(row, answers), found.columns, pairs)
    if find_prompt(row) is None:
        return dialogues(row, found.columns)._replace(pairs=pairs)
    questions, one, other = (text_turns(row.get(column)) for column in ("prompt", *found.columns))
    if questions and one and other:
        spoken = _interleaved(questions, one, other, found.columns)
        return dialogues(spoken, found.columns)._replace(pairs=pairs)
    answers = [(column, row[column]) for column in found.columns]
    return Parsed(*read_prompt_and_answers(row, answers), found.columns, pairs)


def find_pair(row: Row) -> Responses | None:
    """The columns of two answers, or twice the column of a list of two, which are numbered from 0."""
    found = find_responses(tuple(row))
    column = find_first(row, LISTS)
    if found is None and column is not None and is_list(row[column]) and len(row[column]) == 2:
        return Responses((column, column), ("0", "1"))
    return found


def has_verdict(row: Row) -> bool:
    """Return whether the row holds two answers and names the better one."""
    found = find_pair(row)
    try:
        return found is not None and bool(find_verdict(row, found))
    except BadRow:
        return False


def find_verdict(row: Row, responses: Responses) -> Verdict:
    """The columns that compare the answers.

    Raises `BadRow` where there are none, or several that may differ.
    """
    one, other = responses.numbers
    if responses.columns == ("human_ref_A", "human_ref_B") and "labels" in row:
        return Verdict("shp", ("labels",))
    named = [name for name in NAMED if name in row] or [name for name in SIGNED if name in row]
    if len(named) > 1 and named[0] != NAMED[0]:
        raise BadRow(
            f"{' and '.join(f'`{name}`' for name in named)} may prefer different answers: choose one with "
            f"`map`, for example `map` {NAMED[0]}={named[0]}"
        )
    if named:
        return Verdict("named" if named[0] in NAMED else "signed", (named[0],))
    for stem in ("winner_model_", "winner_"):
        if {stem + one, stem + other} <= row.keys():
            return Verdict("flags", (stem + one, stem + other))
    for pattern in SCORES:
        scores = tuple(
            pattern.format(number=number, column=column)
            for column, number in zip(responses.columns, responses.numbers, strict=True)
        )
        if scores[0] != scores[1] and {*scores} <= row.keys():
            return Verdict("scores", scores)
    if isinstance(row.get("label"), str) and _as_number(row["label"]) is None:  # numbers mean many things
        return Verdict("named", ("label",))
    raise BadRow(
        f"no column tells which of {_shown(responses)} is better: name one that holds {one} or {other} with "
        f"`map`, for example `map` {NAMED[0]}=choice"
    )


def text_turns(value: Any) -> list[str] | None:
    """The turns of one speaker: a list of texts, or one as JSON; None for anything else."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if is_list(value) and value and all(isinstance(turn, str) for turn in value) else None


def _interleaved(
    questions: list[str], one: list[str], other: list[str], columns: tuple[str, str]
) -> dict[str, list[Message]]:
    """Two dialogues of the same questions."""
    if not len(questions) == len(one) == len(other):
        raise BadRow(f"`prompt`, `{columns[0]}` and `{columns[1]}` are lists of different lengths")
    return {
        column: [
            {"role": role, "content": text}
            for turn in zip(questions, answers, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        for column, answers in zip(columns, (one, other), strict=True)
    }


def _better(row: Row, responses: Responses, verdict: Verdict) -> int | None:
    """The position of the better answer; None for a tie."""
    values = [row[column] for column in verdict.columns]
    if verdict.kind == "named":
        return _named(row, responses, verdict.columns[0])
    if verdict.kind == "signed" and _as_number(values[0]) is None:
        return _named(row, responses, verdict.columns[0])
    numbers = [_as_number(value) for value in values]
    for column, value, number in zip(verdict.columns, values, numbers, strict=True):
        if number is None:
            raise BadRow(f"`{column}` is {describe(value)}, expected a number")
    merits = [number or 0.0 for number in numbers]
    if verdict.kind == "shp":
        if merits[0] not in (0, 1):
            raise BadRow(f"`labels` is {values[0]}, expected 1 (human_ref_A is better) or 0")
        return int(merits[0] == 0)
    if verdict.kind == "signed":
        merits = [-merits[0], merits[0]]
    return None if merits[0] == merits[1] else int(merits[1] > merits[0])


def _named(row: Row, responses: Responses, column: str) -> int | None:
    """The answer that a number, a letter, the name of a column or the name of a model names."""
    value = row[column]
    if value is None or isinstance(value, (bool, list, dict)):
        raise BadRow(f"`{column}` is {describe(value)}, expected {' or '.join(responses.numbers)}")
    number = _as_number(value)
    text = str(int(number)) if number is not None and number == int(number) else str(value).strip()
    if text.lower() in TIES:
        return None
    one, other = responses.numbers
    if text.lower() == f"{one}={other}".lower():
        return None
    for place, (name, loser) in enumerate(((one, other), (other, one))):
        known = [name, f"{name}>{loser}", f"{name}>>{loser}", *(f"{kind}_{name}" for kind in KINDS)]
        if text.lower() in (word.lower() for word in (*known, responses.columns[place])):
            return place
    models = [row.get(f"model_{name}") for name in responses.numbers]
    if models.count(value) == 1:
        return models.index(value)
    raise BadRow(
        f"`{column}` is {str(value)[:40]!r}, expected {one} or {other} (for {_shown(responses)}), or tie"
    )


def _shown(responses: Responses) -> str:
    one, other = responses.columns
    return f"`{one}` and `{other}`" if one != other else f"the answers in `{one}`"


def _as_number(value: Any) -> float | None:
    """A finite number, or a text that is one."""
    if not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
