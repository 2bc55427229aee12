"""Tables that change while a notebook's cell runs: of a training run, and of the runs of a sweep.

A training run has about ten rows of training, and each evaluation:

    steps      loss  accuracy   margin  eval loss  eval accuracy  eval margin
    0                                      0.6931              -      +0.0000
    1 to 10  0.6702     71.2%  +0.0480
    11 to 17 0.6377     80.4%  +0.1221     0.6512          68.4%      +0.0911

Values of training are means of a row's steps, each before its update. A sweep has a row for each run, with
its last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

NUM_PERIODS = 10
LAST_ROWS = 24  # that are shown, and the first one
COLUMNS = {"loss": "{:.4f}", "rewards/accuracies": "{:.1%}", "rewards/margins": "{:+.4f}"}
NAMES = ("loss", "accuracy", "margin")

Metrics = dict[str, Any]


class LiveTable:
    """The rows so far; `note` gets each line of metrics.jsonl."""

    def __init__(self) -> None:
        self._rows: list[list[str]] = []
        self._steps: list[Metrics] = []  # since the last row
        self._last_step: int | None = None  # of the last row
        self._has_evaluations = False

    def note(self, metrics: Metrics) -> None:
        """Add the metrics of a step or of an evaluation."""
        if "eval/loss" in metrics:
            self._note_evaluation(metrics)
            return
        self._steps.append(metrics)
        step, total = metrics["step"], metrics["total_steps"]
        if step == total or step % max(1, math.ceil(total / NUM_PERIODS)) == 0:
            self._end_row()

    def titles(self) -> list[str]:
        """The titles of the columns; those of evaluations are left out without any."""
        return ["steps", *NAMES, *(f"eval {name}" for name in NAMES if self._has_evaluations)]

    def rows(self) -> list[list[str]]:
        """The cells: the first row and the last ones, with the row that is being filled."""
        rows = [*self._rows, *([self._row()] if self._steps else [])]
        width = len(self.titles())
        if len(rows) > LAST_ROWS + 1:
            rows = [rows[0], ["…"], *rows[-LAST_ROWS:]]
        return [[*row, *[""] * (width - len(row))] for row in rows]

    def _note_evaluation(self, metrics: Metrics) -> None:
        self._has_evaluations = True
        if self._steps or self._last_step != metrics["step"]:
            self._end_row(metrics["step"])
        self._rows[-1] = [*self._rows[-1][: 1 + len(NAMES)], *_cells([metrics], "eval/")]

    def _end_row(self, step: int | None = None) -> None:
        """Begin a new row; `step` is that of an evaluation."""
        self._rows.append(self._row() if self._steps else [str(step), *[""] * len(NAMES)])
        self._last_step = self._steps[-1]["step"] if self._steps else step
        self._steps = []

    def _row(self) -> list[str]:
        first, last = self._steps[0]["step"], self._steps[-1]["step"]
        return [str(last) if first == last else f"{first} to {last}", *_cells(self._steps, "")]


class RunsTable:
    """The last step of each run of a sweep that has begun; runs that have ended keep their row."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}

    def note(self, active: Iterable[tuple[str, int | None, Metrics | None]]) -> None:
        """Set the rows of the active runs: name, total steps, and the last line of metrics."""
        for name, total, metrics in active:
            if metrics is None:
                self._rows.setdefault(name, [name, "starting", *[""] * len(NAMES)])
            elif "loss" in metrics:
                self._rows[name] = [name, f"{metrics['step']}/{total}", *_cells([metrics], "")]

    def titles(self) -> list[str]:
        """The titles of the columns."""
        return ["run", "step", *NAMES]

    def rows(self) -> list[list[str]]:
        """The cells, in the order in which the runs began."""
        return list(self._rows.values())


def _cells(lines: Sequence[Metrics], prefix: str) -> list[str]:
    return [_mean((line.get(f"{prefix}{name}") for line in lines), form) for name, form in COLUMNS.items()]


def _mean(values: Iterable[float | None], form: str) -> str:
    """The mean of the known values; an accuracy is unknown where margins are rounding noise."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return form.format(fmean(known)) if known else "-"
