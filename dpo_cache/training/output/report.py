"""What a run tells of itself: its report, its config.json, and how long it will take."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dpo_cache.losses.metrics import Metrics

RECENT_STEPS = 50


@dataclass
class TrainReport:
    """What `train` did."""

    output: str
    model: str | None  # where the trained policy lies; None after a dry run
    num_steps: int
    num_pairs: int
    finished: bool  # False: stopped early, to be resumed
    step_zero_gap: float | None  # nats; None where nothing was compared
    first: Metrics | None
    last: Metrics | None
    eval_before: Metrics | None
    eval_after: Metrics | None  # of the policy that was saved
    elapsed_s: float
    peak_bytes: int
    num_trained: int = 0  # parameters
    num_parameters: int = 0
    best: dict[str, Any] | None = None  # the best evaluation after an update: "step" and "value" of "measure"
    best_model: str | None = None  # where that policy lies, if it is not the one in `model`
    stopped_by_patience: bool = False
    is_dry_run: bool = False
    resolved: dict[str, Any] = field(default_factory=dict)  # what became of the defaults
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        steps = self.first and self.last and (self.first["loss"], self.last["loss"])
        losses = ", loss {:.4f} -> {:.4f}".format(*steps) if steps else ""
        ended = "a dry run" if self.is_dry_run else "finished" if self.finished else "stopped early"
        return f"<TrainReport of {self.output}: {ended}, {self.num_steps:,} steps{losses}>"


class Clock:
    """How long what is left will take, from what steps and evaluations took of late."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._evaluations: deque[float] = deque(maxlen=3)

    def note_step(self, elapsed_s: float) -> None:
        self._steps.append(elapsed_s)

    def note_evaluation(self, elapsed_s: float) -> None:
        self._evaluations.append(elapsed_s)

    def left_s(self, num_steps: int, num_evaluations: int) -> float | None:
        """Seconds for so many steps and evaluations; None before the first step."""
        if not self._steps:
            return None
        evaluation_s = sum(self._evaluations) / len(self._evaluations) if self._evaluations else 0.0
        return num_steps * sum(self._steps) / len(self._steps) + num_evaluations * evaluation_s
