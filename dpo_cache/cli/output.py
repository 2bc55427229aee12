"""How results look on stdout. Progress and remarks go to stderr: see `dpo_cache/progress.py`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from dpo_cache import progress
from dpo_cache.options.base import Options
from dpo_cache.progress import format_bytes as format_bytes
from dpo_cache.progress import format_seconds as format_seconds
from dpo_cache.progress import show_scoring as show_scoring

NUMBER = re.compile(r"[\d,]{1,11}|[\d.]+ [kMG]?B|[+-]?\d+\.\d+|[+-]?[\d.]+%|")


class ProgressLine(progress.ProgressLine):
    """The progress line of a command, whose remarks name options by their flags."""

    def remark(self, text: str) -> None:
        super().remark(with_flags(text))


def remark(text: str) -> None:
    """Write a remark, which names options by their flags, to stderr."""
    progress.remark(with_flags(text))


def with_flags(text: str) -> str:
    """The library's text with the flags of options in place of their names: `max_length` is --max-length."""

    def flag(match: re.Match[str]) -> str:
        name, is_off = match[1], match[2]
        if name not in _option_names():
            return match[0]
        return f"--{'no-' if is_off else ''}{name.replace('_', '-')}"

    return re.sub(r"`([a-z][a-z0-9_]*)(=False)?`", flag, text)


@cache
def _option_names() -> set[str]:
    def classes(kind: type[Options]) -> list[type[Options]]:
        return [kind, *(found for child in kind.__subclasses__() for found in classes(child))]

    return {
        entry.name
        for kind in classes(Options)
        if "__dataclass_fields__" in vars(kind)
        for entry in fields(kind)  # type: ignore[arg-type]
    }


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns, the same on a terminal and in a file."""
    rows = [(label, printable(value)) for label, value in rows]
    width = max(len(label) for label, _ in rows)
    print(title)
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, one line a row; columns of numbers and sizes are aligned to the right."""
    for line in format_columns(titles, rows):
        print(line)


def format_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of such a table."""
    rows = [[printable(entry) for entry in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    numeric = [all(NUMBER.fullmatch(entry) for entry in column) for column in zip(*rows, strict=True)]
    cells = [
        [
            entry.rjust(width) if right else entry.ljust(width)
            for entry, width, right in zip(row, widths, numeric, strict=True)
        ]
        for row in (titles, *rows)
    ]
    return ["  ".join(row).rstrip() for row in cells]


def printable(text: str) -> str:
    """The text with control characters spelled out: a name that a file gives cannot steer the terminal."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def command_line(*words: str) -> str:
    """A command of ours to be copied, its words quoted where a shell needs it."""
    return shlex.join(("dpo-cache", *words))


def count(number: int) -> str:
    return f"{number:,}"
