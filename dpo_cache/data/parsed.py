"""The result of reading one row, whatever its format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpo_cache.data.messages import Message

Content = str | list[Message]
Answers = tuple[Content, ...]
Pairs = tuple[tuple[int, int], ...]  # (chosen, rejected), as positions among the answers


class Parsed(NamedTuple):
    """A prompt and its answers, all text or all messages, and the pairs among the answers."""

    prompt: Content
    answers: Answers
    columns: tuple[str, ...]  # the column of each answer
    pairs: Pairs = ((0, 1),)  # none if all answers rank alike
    notes: tuple[str, ...] = ()  # as `Example.notes`
    tools: Any = None  # tools that are not in the column `tools`


def shared_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of items at the start that two sequences share."""
    if other[: len(one)] == one:
        return len(one)
    differing = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(differing, len(other))


def split_texts(one: str, other: str) -> tuple[str, tuple[str, str]]:
    """The start that two dialogues share, and the rest of each with the space before it.

    Where one dialogue continues the other, or both are equal, the last letter is the answer.
    """
    shared = shared_prefix(one, other)
    if shared and (shared == min(len(one), len(other)) or one[shared - 1] == " "):
        shared -= 1
    return one[:shared], (one[shared:], other[shared:])


def ranked_pairs(merits: Sequence[float], which: str) -> Pairs:
    """The pairs of answers that differ in merit: of each with each lower one (all), or of the best (best)."""
    order = sorted(range(len(merits)), key=lambda place: -merits[place])
    better = [place for place in order if which == "all" or merits[place] == merits[order[0]]]
    return tuple((one, other) for one in better for other in order if merits[one] > merits[other])
