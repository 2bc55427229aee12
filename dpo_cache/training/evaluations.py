"""The schedules of evaluations and checkpoints, and the best evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_cache.losses.metrics import Metrics
from dpo_cache.options.train import period

# Option `best` -> the metric, and 1 if larger values are better, otherwise -1.
MEASURES = {
    "loss": ("eval/loss", -1),
    "accuracy": ("eval/rewards/accuracies", 1),
    "margin": ("eval/rewards/margins", 1),
}


@dataclass(frozen=True)
class Schedule:
    """Every `steps` steps or `epochs` epochs, counted from the start; never if both are None."""

    steps: int | None
    epochs: float | None
    steps_per_epoch: int

    def is_due(self, step: int) -> bool:
        """Return whether the step, numbered from 1, is the first one at or past a multiple of the period."""
        return self._num_passed(step) > self._num_passed(step - 1)

    def count(self, first: int, last: int) -> int:
        """The number of due steps from one step to another, both included."""
        if self.epochs is not None and self.epochs * self.steps_per_epoch < 1:
            return max(0, last - first + 1)
        return max(0, self._num_passed(last) - self._num_passed(first - 1))

    def _num_passed(self, step: int) -> int:
        if self.epochs is None:
            return 0 if self.steps is None else step // self.steps
        return math.floor(step / (self.epochs * self.steps_per_epoch) + 1e-9)


def schedule_of(flag: str, value: str | None, steps_per_epoch: int) -> Schedule:
    """The schedule for the value of an option, such as `100` or `0.5epochs`. Raises `OptionError`."""
    return Schedule(*period(flag, value), steps_per_epoch)


@dataclass
class Best:
    """The best evaluation after an update so far. An equal value is not better, and neither is None."""

    measure: str = "loss"
    step: int | None = None
    value: float | None = None
    num_worse: int = 0  # evaluations since the best one

    def note(self, evaluation: Metrics) -> bool:
        """Count an evaluation, and return whether it is the best."""
        name, sign = MEASURES[self.measure]
        value = evaluation[name]
        if self.value is None and value is None:  # no margin has moved yet, so `patience` does not count
            return False
        if value is None or (self.value is not None and sign * value <= sign * self.value):
            self.num_worse += 1
            return False
        self.step, self.value, self.num_worse = int(evaluation["step"]), float(value), 0
        return True

    def forget(self) -> None:
        """Forget the best evaluation, because its policy is lost: later ones are compared only with each
        other.
        """
        self.step = self.value = None

    def is_better_than(self, evaluation: Metrics | None) -> bool:
        """Return whether the best is better than another evaluation, such as that of the untrained policy."""
        name, sign = MEASURES[self.measure]
        other = None if evaluation is None else evaluation[name]
        return self.value is None or other is None or sign * self.value > sign * other
