"""Why two answers that differ in a row have the same token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_cache.data.examples import Example
from dpo_cache.data.lost import TURNS_AFTER, differing_media

DIFFER_ONLY_IN = "chosen and rejected differ only in {}"
BY_TEMPLATE = "{}, which the chat template leaves out"


def explain_equal_ids(example: Example, pair: tuple[int, int], row: Mapping[str, Any]) -> str | None:
    """The difference between the two answers of a pair, if it is lost in their token ids; None if they are
    equal.

    `row` is as it was read.
    """
    one, other = (example.answers[place] for place in pair)
    if isinstance(one, str):
        return None  # the EOS token at most
    if one != other:
        return DIFFER_ONLY_IN.format(_rendered_away(one, other))
    if media := differing_media(row.get("chosen"), row.get("rejected")):
        return DIFFER_ONLY_IN.format(f"{media}, which are left out, because only text is scored")
    if TURNS_AFTER in example.notes and row.get("chosen") != row.get("rejected"):
        return DIFFER_ONLY_IN.format("turns after the answer, which are left out")
    return None


def _rendered_away(one: Any, other: Any) -> str:
    """The difference between two answers of which the template makes the same text."""
    if len(one) != len(other):
        return BY_TEMPLATE.format("messages")
    both = list(zip(one, other, strict=True))
    names = {
        name: None for left, right in both for name in (*left, *right) if left.get(name) != right.get(name)
    }
    if "content" not in names:
        return BY_TEMPLATE.format(" and ".join(names))
    if all(left["content"].split() == right["content"].split() for left, right in both):
        return "spaces" if len(names) == 1 else BY_TEMPLATE.format(" and ".join(names))
    has_thoughts = any("</think>" in message["content"] for pair in both for message in pair)
    return BY_TEMPLATE.format("their thoughts" if has_thoughts else "a part of their text")
