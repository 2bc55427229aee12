"""The fields in which two descriptions differ, for people to read."""

from __future__ import annotations

from typing import Any

from dpo_cache.errors import printable
from dpo_cache.store.format.documents import Document

LONG = 40  # characters of a value that are shown; of a digest the first 12


def differing_fields(one: Document, other: Document) -> list[str]:
    """A line for each field that differs, such as `dtype: float32 and bfloat16`; a missing field is shown as
    `none`.

    Two identities (see `lm/model/identity.py`) without such a line are of one reference.
    """
    left, right = _flatten(one), _flatten(other)
    names = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
    return [
        f"{printable(name)}: {_show(left.get(name))} and {_show(right.get(name))}"
        for name in sorted(names, key=lambda name: (name.count("."), name))
    ]


def _flatten(value: Document, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict) and entry:
            flat.update(_flatten(entry, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = entry
    return flat


def _show(value: Any) -> str:
    if value is None:
        return "none"
    text = printable(value)
    is_digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return f"{text[:12]}…" if is_digest else text if len(text) <= LONG else f"{text[: LONG - 1]}…"
