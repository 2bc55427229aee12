"""Remarks on metrics that indicate a problem of a run, each logged once.

They are based on means over windows of steps: the metrics of one step of a few pairs are noise. Rewards are
compared, which are log-ratios to the reference, because log-probs depend on the lengths of the answers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from dpo_cache.log import Log
from dpo_cache.losses.metrics import ACCURACY, Metrics
from dpo_cache.options.train import TrainOptions

WINDOW = 20  # steps
SIDES = ("rewards/chosen", "rewards/rejected")
LEAST_PAIRS = 400  # for a remark on the accuracy
STANDARD_ERRORS = 2.0
FEW_STEPS = 50
LEAST_MOVE = 0.02  # least change of the reward margin (0.2 nats): preference of 50.5% for the chosen answer
SATURATED_LOSS = 1e-3  # a sigmoid loss whose gradient is a thousandth of the one at the start


def describe_few_steps(options: TrainOptions, num_pairs: int, total_steps: int, lr: float) -> str:
    """A remark on a run of under 50 steps, with the options that make it longer."""
    a_pass = math.ceil(num_pairs / options.batch_size)
    changes = [f"`epochs` {math.ceil(FEW_STEPS / a_pass)}"]
    if (smaller := max(1, int(num_pairs * options.epochs) // FEW_STEPS)) < options.batch_size:
        changes.insert(0, f"`batch_size` {smaller}")
    if options.max_steps is not None:  # it limits the run whatever the other options are
        changes = [f"`max_steps` {FEW_STEPS}"]
    return (
        f"the run has {total_steps} step{'s' if total_steps > 1 else ''}; a policy learns little in fewer "
        f"than {FEW_STEPS}. For more steps: {' or '.join(changes)}."
        + (f" For larger steps: `lr` {10 * lr:g}." if options.lr is None else "")
    )


class RunWarnings:
    """Logs remarks on the metrics of steps.

    `is_logistic`: the loss is ln 2 for an untrained policy and falls to 0 as margins grow. `has_reference`:
    rewards are against the reference, and so 0 at the start; otherwise they are compared with those of the
    first window. `prefers`: the loss compares answers.
    """

    def __init__(self, log: Log, *, is_logistic: bool, has_reference: bool = True, prefers: bool = True):
        self._log, self._is_logistic = log, is_logistic
        self._has_reference, self._prefers = has_reference, prefers
        self._start: dict[str, float] = {}
        self._steps: deque[Metrics] = deque(maxlen=WINDOW)
        self._logged: set[str] = set()
        self._wins = self._pairs = self._first_margin = 0.0
        self._num_steps = 0

    def resume(self, steps: Iterable[Metrics]) -> None:
        """Record the steps of a stopped run without logging, so that its remarks are not repeated."""
        log, self._log = self._log, lambda _: None
        for step in steps:
            self.note(step)
        self._log = log

    def note(self, step: Metrics) -> None:
        """Record the metrics of a step, and log new remarks."""
        if step.get("grad_norm") == 0 and not self._pairs:
            self._once(
                "still",
                "the gradient of the first step is 0: nothing is learned from it. Does the adapter act on "
                "these layers at all?",
            )
        step = {**step, ACCURACY: 0.5 if step[ACCURACY] is None else step[ACCURACY]}
        if not self._num_steps:
            self._first_margin = step["rewards/margins"]
        self._num_steps += 1
        self._steps.append(step)
        self._wins += step[ACCURACY] * step["num_pairs"]
        self._pairs += step["num_pairs"]
        if len(self._steps) < WINDOW:
            return
        if self._prefers:
            self._note_likelihoods()
            self._note_accuracy()
        if self._is_logistic and self._mean("loss") < SATURATED_LOSS:
            self._once(
                "saturated",
                f"margins are saturated: the loss was {self._mean('loss'):.1e} over the last {WINDOW} "
                "steps, so there is almost no gradient left. "
                "A smaller `beta`, `label_smoothing` or fewer `epochs` avoid that.",
            )

    def conclude(self, before: Metrics | None, after: Metrics | None, *, beta: float, lr: float) -> None:
        """After the last step, log a remark if the margin hardly moved, in steps and between the evaluations
        `before` and `after` the training; `lr` is the peak learning rate.
        """
        changes = []
        if before and after:
            changes.append(after["eval/rewards/margins"] - before["eval/rewards/margins"])
        if self._num_steps >= 3:  # the first two may be measured before any weight has changed
            last = list(self._steps)[-max(1, len(self._steps) // 4) :]
            changes.append(sum(step["rewards/margins"] for step in last) / len(last) - self._first_margin)
        limit = LEAST_MOVE * min(1.0, beta / 0.1)
        if self._prefers and changes and all(abs(change) < limit for change in changes):
            self._once(
                "hardly moved",
                f"the margin hardly moved, by {changes[0]:+.4f}: the policy is almost what it was. Try `lr` "
                f"{10 * lr:g} (it was {lr:g}), or more steps: more `epochs`, or a smaller `batch_size`.",
            )

    def _note_likelihoods(self) -> None:
        if not self._start:
            self._start = {
                name: 0.0 if self._has_reference else self._mean(name) for name in (*SIDES, "rewards/margins")
            }
        chosen, rejected = (self._mean(name) - self._start[name] for name in SIDES)
        if chosen < 0 < rejected and self._has_moved("rewards/margins"):
            self._once(
                "swapped",
                f"the rejected answers become likelier (reward {rejected:+.3f} over {WINDOW} steps) and "
                f"the chosen ones less likely ({chosen:+.3f}): the policy learns the opposite. Are chosen "
                "and rejected swapped in the data?",
            )

    def _note_accuracy(self) -> None:
        """The pairs are new to the policy: if it learns anything that generalizes, accuracy leaves 50 %."""
        recent = sum(step["num_pairs"] for step in self._steps)
        if self._pairs < LEAST_PAIRS or recent < LEAST_PAIRS / 8:
            return
        error = 0.5 / math.sqrt(self._pairs)
        if abs(self._wins / self._pairs - 0.5) < STANDARD_ERRORS * error and abs(
            self._mean(ACCURACY) - 0.5
        ) < 0.5 / math.sqrt(recent):
            self._once(
                "stuck",
                f"accuracy stays at 50% (of {self._pairs:.0f} pairs so far {self._wins / self._pairs:.1%}): "
                "nothing is learned that carries over to new pairs. A larger `lr` may help, or the labels "
                "are noise.",
            )

    def _mean(self, name: str) -> float:
        return sum(step[name] for step in self._steps) / len(self._steps)

    def _has_moved(self, name: str) -> bool:
        values = [step[name] for step in self._steps]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return abs(mean - self._start[name]) > STANDARD_ERRORS * deviation / math.sqrt(len(values))

    def _once(self, sign: str, text: str) -> None:
        if sign not in self._logged:
            self._logged.add(sign)
            self._log(text)
