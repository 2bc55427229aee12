"""The report of a run, and an estimate of its remaining time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from dpo_cache.losses.metrics import Metrics
from dpo_cache.planning.forecast import Forecast
from dpo_cache.training.output.html import train_html

RECENT_STEPS = 50


@dataclass
class TrainReport:
    """The result of `train`."""

    output: str
    model: str | None  # folder of the trained policy; None after a dry run
    num_steps: int
    num_pairs: int
    finished: bool  # False: stopped early, to be resumed
    step_zero_gap: float | None  # nats; None if nothing was compared
    first: Metrics | None
    last: Metrics | None
    eval_before: Metrics | None
    eval_after: Metrics | None  # evaluation of the saved policy
    elapsed_s: float
    peak_bytes: int
    num_trained: int = 0  # parameters
    num_parameters: int = 0
    best: dict[str, Any] | None = None  # the best evaluation after an update: "step" and "value" of "measure"
    best_model: str | None = None  # folder of the best policy, if it is not the one in `model`
    stopped_by_patience: bool = False
    is_dry_run: bool = False
    forecast: Forecast | None = None  # only after a dry run
    resolved: dict[str, Any] = field(default_factory=dict)  # the values in place of `auto` and other defaults
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        steps = self.first and self.last and (self.first["loss"], self.last["loss"])
        losses = ", loss {:.4f} -> {:.4f}".format(*steps) if steps else ""
        ended = "a dry run" if self.is_dry_run else "finished" if self.finished else "stopped early"
        return f"<TrainReport of {self.output}: {ended}, {self.num_steps:,} steps{losses}>"

    def _repr_html_(self) -> str:
        return train_html(self)


@dataclass
class Clock:
    """Estimates the remaining time, from the durations of recent steps and evaluations."""

    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    evaluations_s: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def left_s(self, num_steps: int, num_evaluations: int) -> float | None:
        """Seconds for so many steps and evaluations; None before the first step."""
        if not self.steps_s:
            return None
        evaluation_s = fmean(self.evaluations_s) if self.evaluations_s else 0.0
        return num_steps * fmean(self.steps_s) + num_evaluations * evaluation_s
