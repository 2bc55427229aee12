"""Text that begins like a list of messages and cannot be parsed: what it looks like.

pandas writes a list into CSV as Python prints it, and numpy prints a list of objects without commas. Cells of
spreadsheets are cut off.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_cache.data.json_text import NOT_JSON, parse_json
from dpo_cache.data.roles import ROLES

_NAMES = "|".join(name for names in ROLES.values() for name in names)
_WRAPPER = r"""\s*(?:\{\s*["'](?:messages|conversations?)["']\s*:\s*)?(?:array\()?"""
_ROLE = rf"""["'](?:role|from)["']\s*:\s*["'](?:{_NAMES})["']"""
_LISTED = re.compile(
    rf"""{_WRAPPER}[\[\s]*\[\s*\{{\s*(?:["'](?:role|from|content|value)["']\s*:\s*["'\[]|["']\w+["']\s*:.*?{_ROLE})""",
    re.DOTALL | re.IGNORECASE,
)
_ONE = re.compile(rf"""\s*\{{\s*(?:["']\w+["']\s*:[^{{}}]*?)?{_ROLE}""", re.IGNORECASE)
_CONTENT = re.compile(r"""["'](?:content|value|tool_calls)["']\s*:""")
_STARTS_LIKE_ONE = re.compile(r"""\s*\{\s*["'](?:role|from|content|value)["']\s*:\s*["']""")
_FIRST_QUOTE = re.compile(r"[^\"']*([\"'])")
_TOKEN = re.compile(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[\[\]{}()]""", re.DOTALL)
_WITHOUT_COMMA = re.compile(r"\}\s*\{")


def find_broken(value: Any, *, is_sure: bool = False) -> str | None:
    """The look of broken messages in a text, or in one of several texts; None if there are none.

    `is_sure`: the column holds messages in other rows or for other reasons, so the start of one is enough.
    """
    if isinstance(value, list):
        return next((kind for text in value if (kind := find_broken(text, is_sure=is_sure))), None)
    if not isinstance(value, str):
        return None
    text = _decoded(value)
    if text[:1] not in "[{a" and text.lstrip()[:1] not in ("[", "{"):
        return None
    starts_like_one = is_sure and _STARTS_LIKE_ONE.match(text) is not None
    if not starts_like_one and not _looks_like_messages(text):
        return None
    return None if parse_json(text) is not NOT_JSON else _kind(text)


def is_printed(text: str) -> bool:
    """Return whether text in brackets is quoted as Python prints it."""
    quote = _FIRST_QUOTE.match(text)
    return quote is not None and quote[1] == "'"


def _looks_like_messages(text: str) -> bool:
    is_listed = _LISTED.match(text) is not None
    return is_listed or (_ONE.match(text) is not None and _CONTENT.search(text) is not None)


def _decoded(text: str) -> str:
    """The text that JSON of text holds, also where that is cut off."""
    if text[:2] not in ('"[', '"{'):
        return text
    inner = parse_json(text)
    return inner if isinstance(inner, str) else text.strip('"').replace('\\"', '"')


def _kind(text: str) -> str | None:
    end = _closing(text)
    if end is None:
        return "that are cut off"
    rest = text[end:].strip()
    if rest[:1] in ("[", "{", ","):
        return "in several pieces of JSON"
    if rest:
        return None  # prose about messages
    if is_printed(text):
        has_commas = _WITHOUT_COMMA.search(text) is None
        return f"as {'Python' if has_commas else 'numpy'} prints them" + (
            ", with values that are not literals" if has_commas else ", without commas"
        )
    return "but is not JSON"


def _closing(text: str) -> int | None:
    """Where the first bracket is closed."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}.get(token[0], 0)
        if depth <= 0 and token[0] in ("]", "}", ")"):
            return token.end()
    return None
