"""JSON text, and the Python literals that pandas writes into CSV, as values."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any

from dpo_cache.data.fields import BadRow

NOT_JSON = object()


def parse_json(text: str) -> Any:
    """The value of JSON text or of a Python literal in brackets; `NOT_JSON` for other text."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        pass
    if text.lstrip()[:1] not in ("[", "{"):
        return NOT_JSON
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange escapes
            literal = ast.literal_eval(text.strip())
        return json.loads(json.dumps(literal))  # tuples as lists
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return NOT_JSON


def parse_unique(text: str, name: str) -> Any:
    """The same for a part of the column `name`. Raises `BadRow` if an object has a name twice."""
    value = parse_json(text)
    if value is not NOT_JSON and (twice := _name_twice(text)) is not None:
        raise BadRow(f"`{name}` has JSON text in which the name {twice!r} occurs twice in one object")
    return value


def _name_twice(text: str) -> str | None:
    """The first name that an object in JSON text, or a dict in a Python literal, has twice."""
    found: list[str] = []

    def note(names: Sequence[Any]) -> None:
        found.extend(name for place, name in enumerate(names) if name in names[:place])

    try:
        json.loads(text, strict=False, object_pairs_hook=lambda pairs: note([name for name, _ in pairs]))
    except ValueError:
        for node in ast.walk(ast.parse(text.strip(), mode="eval")):
            if isinstance(node, ast.Dict):
                note([key.value for key in node.keys if isinstance(key, ast.Constant)])
    return found[0] if found else None
