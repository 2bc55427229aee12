"""The kinds of members of sealed documents: whoever sealed one may have written anything into it.

Members that are there must be of these kinds wherever a document is read, so no reader checks them again.
Some may be missing; `checks.py` requires those that describe how pairs were made.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any

from dpo_cache.store.format.documents import Document

Kind = Callable[[Any], bool]
LONGEST = 2**31  # tokens of a row, which no manifest may promise


def wrong_members(document: Document, kinds: dict[str, dict[str, Kind]]) -> list[str]:
    """The names of members, such as `source.map`, that are there and not of their kind."""
    wrong = []
    for member, inner in kinds.items():
        found = document.get(member, {})
        if not isinstance(found, dict):
            wrong.append(member)
            continue
        wrong += [
            f"{member}.{name}"
            for name, is_kind in inner.items()
            if name in found and not is_kind(found[name])
        ]
    return wrong


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value < LONGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_map(value: Any) -> bool:
    """Return whether it is a list of texts such as `prompt=question`."""
    return isinstance(value, list) and all(isinstance(entry, str) and "=" in entry for entry in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_template(value: Any) -> bool:
    return _is_text_or_none(value) or (isinstance(value, dict) and all(map(_is_text, value.values())))


def _is_day(value: Any) -> bool:
    try:
        return bool(date.fromisoformat(value))
    except (TypeError, ValueError):
        return False


MANIFEST: dict[str, dict[str, Kind]] = {
    "source": {
        "dataset": _is_text,
        "format": _is_text,
        "map": _is_map,
        "ranked_pairs": _is_text,
        "on_error": _is_text,
        "early_answers": _is_text,
        "rows_of": _is_text,
        "rows_read": _is_count_or_none,
        "rows_dropped": _is_counts,
        "created": _is_text,
    },
    "tokenization": {
        "tokenizer": _is_text_or_none,
        "tokenizer_sha256": _is_text_or_none,
        "chat_template": _is_template,
        "template_date": _is_day,
        "max_length": _is_length,
        "truncation": _is_text,
        "max_prompt_length": lambda value: value is None or _is_length(value),
    },
    "audit": {
        "completions": _is_count,
        "tokens": _is_count,
        "largest_gap": _is_number,
        "mean_gap": _is_number,
    },
}
REFERENCE: dict[str, dict[str, Kind]] = {
    "identity": {"dtype": _is_text_or_none, "imported": _is_text, "weights_of": _is_text},
    "provenance": {
        "model": _is_text_or_none,
        "revision": _is_text_or_none,
        "tokenizer": _is_text_or_none,
        "described": _is_text_or_none,
        "imported_from": _is_text_or_none,
    },
}
