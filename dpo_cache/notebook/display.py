"""Live progress in a notebook: one output, replaced a few times a second, without ipywidgets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dpo_cache.errors import printable, printable_lines
from dpo_cache.notebook.html import bar, card, note, table
from dpo_cache.notebook.live_table import LiveTable, RunsTable

SECONDS = 0.25  # between two states that are shown
LAST_REMARKS = 20

Show = Callable[[dict[str, str]], None]  # gets a mime bundle


def notebook_output() -> Show | None:
    """A function that shows a mime bundle in place of the one before; None outside notebooks.

    IPython in a terminal is no notebook: it has no kernel, and its outputs cannot be replaced.
    """
    ipython = sys.modules.get("IPython")  # imported before this program, if there is a notebook
    if ipython is None or getattr(ipython.get_ipython(), "kernel", None) is None:
        return None
    handle = ipython.display.DisplayHandle()
    is_shown = False

    def show(bundle: dict[str, str]) -> None:
        nonlocal is_shown
        (handle.update if is_shown else handle.display)(bundle, raw=True)
        is_shown = True

    return show


class NotebookProgress:
    """A bar with its text, the table of a training run or of a sweep, and remarks."""

    def __init__(self, title: str, show: Show, clock: Callable[[], float] = time.monotonic):
        self._title, self._show, self._clock = title, show, clock
        self._started, self._shown = clock(), float("-inf")
        self._share, self._detail = 0.0, ""
        self._remarks: list[str] = []
        self._steps, self._runs = LiveTable(), RunsTable()
        self._is_empty = True  # nothing to show yet

    def update(self, share: float, detail: str) -> None:
        """Show how far the work is, from 0 to 1."""
        self._share, self._detail = share, detail
        self._refresh()

    def remark(self, line: str) -> None:
        """Show a remark below the bar, from now on."""
        self._remarks.append(line)
        self._refresh()

    def note_metrics(self, metrics: dict[str, Any]) -> None:
        """Add a line of metrics.jsonl to the table."""
        self._steps.note(metrics)
        self._refresh()

    def note_runs(self, active: Sequence[tuple[str, int | None, dict[str, Any] | None]]) -> None:
        """Show the active runs of a sweep: name, total steps, and the last line of metrics.jsonl."""
        self._runs.note(active)
        self._refresh()

    def close(self, *, has_failed: bool = False) -> None:
        """Show the last state, which stays in the notebook.

        Work that ended between its start and its end was stopped; without any progress there was no work.
        """
        if self._is_empty:
            return
        if not has_failed and (self._share >= 1 or self._share == 0):
            self._share, self._detail = 1.0, f"done in {self._clock() - self._started:.1f} s"
        self._show(self._bundle())

    def _refresh(self) -> None:
        self._is_empty = False
        if self._clock() - self._shown >= SECONDS:
            self._shown = self._clock()
            self._show(self._bundle())

    def _bundle(self) -> dict[str, str]:
        return {"text/html": self._html(), "text/plain": self._plain()}

    def _html(self) -> str:
        hidden = len(self._remarks) - LAST_REMARKS
        before = [f"({hidden} remarks before these)"] if hidden > 0 else []
        tables = [(shown.titles(), shown.rows()) for shown in (self._steps, self._runs)]
        return card(
            self._title,
            bar(self._share, self._detail),
            *(table(titles, rows) for titles, rows in tables if rows),
            *map(note, [*before, *self._remarks[-LAST_REMARKS:]]),
        )

    def _plain(self) -> str:
        head = f"{self._title}  {self._detail}"
        return "\n".join([printable(head), *map(printable_lines, self._remarks[-LAST_REMARKS:])])
