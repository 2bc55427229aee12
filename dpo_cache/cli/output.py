"""How results and progress look: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from dpo_cache.lm.progress import ScoringProgress

NUMBER = re.compile(r"[\d,]{1,11}|[\d.]+ [kMG]?B|[+-]?\d+\.\d+|[+-]?[\d.]+%|")
QUIET_SECONDS = 10.0  # between progress lines off a terminal


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Two columns, the same on a terminal and in a file."""
    rows = [(label, printable(value)) for label, value in rows]
    width = max(len(label) for label, _ in rows)
    print(title)
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, one line a row; columns of numbers and sizes stand to the right."""
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


def remark(text: str) -> None:
    """One remark, on stderr."""
    print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """A bar on a terminal, a line now and then elsewhere; nothing where DPO_CACHE_PROGRESS is off, as in a
    run whose sweep tells its progress.
    """

    def __init__(self, description: str):
        self._description = description
        self._started = self._printed = time.monotonic()
        self._is_off = os.environ.get("DPO_CACHE_PROGRESS") == "off"
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not self._is_off:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}")
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(description, detail="")

    def update(self, done: float, total: float, detail: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif not self._is_off and time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed = time.monotonic()
            remark(f"{self._description} {done / total:4.0%}  {detail}")

    def remark(self, text: str) -> None:
        """A remark that does not tear the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            remark(text)

    def pause(self, show: Callable[[], None]) -> None:
        """Print a result meanwhile, without the bar."""
        if self._bar is not None:
            self._bar.stop()
        show()
        sys.stdout.flush()
        if self._bar is not None:
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def show_scoring(line: ProgressLine, progress: ScoringProgress) -> None:
    """How far a model is with scoring."""
    rates = f"{progress.tokens_per_s:,.0f} tokens/s  {progress.pairs_per_s:.2f} pairs/s"
    line.update(
        progress.num_tokens, progress.total_tokens, f"{rates}  {format_seconds(progress.seconds_left)} left"
    )


def format_bytes(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int) -> str:
    return f"{number:,}"
