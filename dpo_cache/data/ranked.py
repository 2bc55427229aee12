"""Rows of several answers that are ranked or scored, in lists side by side or in a list of objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cache.data.columns import LISTS, RANKS, SCORES, find_first
from dpo_cache.data.fields import objects_of_lists
from dpo_cache.data.messages import BadRow, describe
from dpo_cache.data.parsed import Parsed, ranked_pairs
from dpo_cache.data.prompts import ANSWER_FIELDS, Row, read_prompt_and_answers

# Fields of an answer that is an object; the first that each answer of a row has
ANSWER = (*ANSWER_FIELDS, "messages", "message")
RANK = ("rank",)  # the lower the better
SCORE = (
    "fine-grained_score", "overall_score", "score", "overall_rating", "rating", "reward", "pm_score",
    "rm_score", "reward_score", "average_score", "average_rating", "avg_score", "avg_rating", "mean_score",
    "annotations", "evals", "evaluation", "scores",
)  # fmt: skip
INNER_SCORES = ("score", "overall_score", "overall", "rating", "Rating", "value")
SYSTEM = "custom_system_prompt"  # UltraFeedback prompted each model in another way


def parse_ranked(row: Row, which: str) -> Parsed:
    """Answers in one list, their scores (higher is better) or ranks (1 is best) in another."""
    column = find_first(row, LISTS) or LISTS[0]
    answers = row.get(column)
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadRow(f"`{column}` is not a list of two answers or more")
    return _parsed(row, column, answers, _merits(row, column, len(answers)), which)


def parse_completions(row: Row, which: str) -> Parsed:
    """Answers as objects that hold their rank (the lower the better) or score (the higher the better)."""
    column = find_first(row, LISTS) or LISTS[0]
    items = _as_list(row.get(column))
    if not isinstance(items, list) or len(items) < 2 or not all(isinstance(item, dict) for item in items):
        raise BadRow(f"`{column}` is not a list of two answers or more, each with its rank or score")
    field = _shared_field(items, ANSWER)
    if field is None:
        raise BadRow(f"`{column}` has an answer without text: expected one of {', '.join(ANSWER)}")
    ranking = _shared_field(items, (*RANK, *SCORE))
    if ranking is None:
        raise BadRow(f"`{column}` has no rank or score that all its answers have")
    sign = -1.0 if ranking in RANK else 1.0
    merits = [sign * _number(item[ranking], f"`{ranking}` in `{column}`") for item in items]
    parsed = _parsed(row, column, [item[field] for item in items], merits, which)
    return parsed._replace(notes=_notes(items, ranking))


def is_scored(value: Any) -> bool:
    """Return whether it is a list of answers, each an object with its rank or score."""
    items = _as_list(value)
    items = items if isinstance(items, list) else []
    is_objects = bool(items) and all(isinstance(item, dict) for item in items)
    return is_objects and None not in (_shared_field(items, ANSWER), _shared_field(items, (*RANK, *SCORE)))


def _as_list(value: Any) -> Any:
    """A list of objects, where the value is an object of lists."""
    found = objects_of_lists(value)
    return value if found is None else found


def _parsed(row: Row, column: str, answers: Sequence[Any], merits: Sequence[float], which: str) -> Parsed:
    contents = read_prompt_and_answers(row, [(column, answer) for answer in answers])
    return Parsed(*contents, (column,) * len(answers), ranked_pairs(merits, which))


def _merits(row: Row, column: str, num_answers: int) -> list[float]:
    """One number for each answer, the higher the better."""
    present = [name for name in (*SCORES, *RANKS) if row.get(name) is not None]
    if not present:
        raise BadRow("it has neither `scores` nor `ranks`")
    name = present[0]
    values, sign = row[name], -1.0 if name in RANKS else 1.0
    if not isinstance(values, list):
        raise BadRow(f"`{name}` is {describe(values)}, expected a list of numbers")
    for value in values:
        if not isinstance(value, (int, float)) or value != value:
            wrong = "null" if value is None else "NaN" if value != value else describe(value)
            raise BadRow(f"`{name}` holds {wrong}, expected numbers")
    if len(values) != num_answers:
        raise BadRow(f"`{name}` has {len(values)} numbers for {num_answers} {column}")
    return [sign * value for value in values]


def _shared_field(items: Sequence[Row], names: Sequence[str]) -> str | None:
    """The first of these fields that is in each item."""
    return next((name for name in names if all(item.get(name) is not None for item in items)), None)


def _number(value: Any, place: str) -> float:
    """A score: a number, a number as text, an object with one, or the mean of UltraFeedback's annotations."""
    if isinstance(value, dict):
        inner = find_first({name for name, found in value.items() if found is not None}, INNER_SCORES)
        if inner is not None:
            return _number(value[inner], f"`{inner}` of {place}")
        aspects = [aspect for aspect in value.values() if isinstance(aspect, dict)]
        if not aspects:
            raise BadRow(f"{place} is an object without a score")
        return sum(_number(aspect, place) for aspect in aspects) / len(aspects)
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError) as error:
        raise BadRow(f"{place} is {describe(value)}, expected a number") from error
    if number != number:
        raise BadRow(f"{place} is NaN, expected a number")
    return number


def _notes(items: Sequence[Row], ranking: str) -> tuple[str, ...]:
    others = [
        name for name in (*RANK, *SCORE)
        if name not in (ranking, "annotations") and all(item.get(name) is not None for item in items)
    ]  # fmt: skip
    notes = []
    if others:
        shown = " and ".join(f"`{name}`" for name in others)
        notes.append(f"its answers are ranked by `{ranking}`, not by {shown}")
    if any(item.get(SYSTEM) for item in items):
        notes.append(f"`{SYSTEM}` of its answers is left out")
    return tuple(notes)
