"""When a run evaluates and saves, what an evaluation gives, and which was the best."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from dpo_cache.errors import TrainingError, shown_rows
from dpo_cache.losses.metrics import Metrics, PairMetrics
from dpo_cache.options.train import period
from dpo_cache.training.batches import stream_pairs
from dpo_cache.training.inputs import TrainingPairs
from dpo_cache.training.step import TrainingStep

# Option `best` -> the metric, and whether more of it is better.
MEASURES = {
    "loss": ("eval/loss", False),
    "accuracy": ("eval/rewards/accuracies", True),
    "margin": ("eval/rewards/margins", True),
}


@dataclass(frozen=True)
class Schedule:
    """Every so many steps or epochs, counted from the start; neither: never."""

    steps: int | None
    epochs: float | None
    steps_per_epoch: int

    def is_due(self, step: int) -> bool:
        """Whether the step, numbered from 1, is the first at or past the next time."""
        if self.epochs is not None:
            return self._num_passed(step) > self._num_passed(step - 1)
        return self.steps is not None and step % self.steps == 0

    def count(self, first: int, last: int) -> int:
        """How often it is due from one step to another, both included."""
        if self.epochs is not None and self.epochs * self.steps_per_epoch < 1:
            return max(0, last - first + 1)
        return max(0, self._num_passed(last) - self._num_passed(first - 1))

    def _num_passed(self, step: int) -> int:
        if self.epochs is None:
            return 0 if self.steps is None else step // self.steps
        return math.floor(step / (self.epochs * self.steps_per_epoch) + 1e-9)


def schedule_of(flag: str, value: str | None, steps_per_epoch: int) -> Schedule:
    """The schedule that an option asks for, such as `100` or `0.5epochs`. Raises `OptionError`."""
    return Schedule(*period(flag, value), steps_per_epoch)


def evaluate(training_step: TrainingStep, data: TrainingPairs, *, at_once: int, step: int) -> Metrics:
    """Means over the evaluation pairs under the policy as it is after a step, against the cached reference;
    `at_once` pairs at a time.

    Raises `TrainingError` naming the rows whose loss is not finite, and where step zero is wrong.
    """
    assert data.eval_pairs is not None
    metrics = PairMetrics()
    stream = stream_pairs(data.eval_pairs, data.eval_selected, shuffle=False, seed=0, epoch=0)
    while pairs := list(islice(stream, at_once)):
        values = training_step.measure(pairs)
        if not math.isfinite(values.means()["loss"]):
            rows = shown_rows(training_step.rows_with_nonfinite_loss(pairs))
            raise TrainingError(
                f"the evaluation after step {step} gives a loss that is not finite, by row {rows} of the "
                "data.\nNo model was saved. Lower `lr`."
            )
        metrics.merge(values)
        if training_step.step_zero is not None:
            training_step.step_zero.stop_if_wrong()
    return metrics.means()


@dataclass
class Best:
    """The best evaluation after an update so far; a value that is equal is no better."""

    measure: str = "loss"
    step: int | None = None
    value: float | None = None
    num_worse: int = 0  # evaluations since

    def note(self, evaluation: Metrics) -> bool:
        """Take an evaluation in; whether it is the best."""
        name, more_is_better = MEASURES[self.measure]
        value = float(evaluation[name])
        if self.value is not None and (value <= self.value if more_is_better else value >= self.value):
            self.num_worse += 1
            return False
        self.step, self.value, self.num_worse = int(evaluation["step"]), value, 0
        return True

    def is_better_than(self, evaluation: Metrics | None) -> bool:
        """Whether the best is better than another evaluation, such as that of the untrained policy."""
        name, more_is_better = MEASURES[self.measure]
        if evaluation is None or self.value is None:
            return True
        return self.value > evaluation[name] if more_is_better else self.value < evaluation[name]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)
