"""One step of training: its pairs are split into parts that fit, run, given losses, and the weights updated.

pairs -> split -> run -> losses -> backward -> update
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.device import release_free_bytes
from dpo_cache.lm.policy import CompletionLogps, PolicyModel, join_logps
from dpo_cache.log import Log
from dpo_cache.losses.metrics import PairMetrics
from dpo_cache.losses.objective import Objective
from dpo_cache.training.batches import Group, completions_of, split_step
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.output.run_start import find_checkpoints
from dpo_cache.training.pair_logps import mean_chosen_tokens, policy_losses
from dpo_cache.training.step_memory import StepMemory
from dpo_cache.training.step_zero import StepZero
from dpo_cache.types import Completion, ScoredPair

Result = TypeVar("Result")


@dataclass(frozen=True)
class Part:
    """Groups of pairs whose losses are computed together, and for each group the lists of completions to run
    at once.

    With one list in all, the losses go back through the log-probs of that one run. With several, each is run
    twice: without gradients, until the losses and their gradients by each token's log-prob are known, and
    again to carry those into the model. Memory holds one of them at a time.
    """

    groups: list[Group]
    pieces: list[list[list[Completion]]]

    @property
    def runs_twice(self) -> bool:
        return sum(map(len, self.pieces)) > 1

    @property
    def all_pieces(self) -> list[list[Completion]]:
        return [piece for pieces in self.pieces for piece in pieces]


@dataclass
class TrainingStep:
    """Updates a policy, one step at a time.

    `step_zero` compares the first log-probs with the cache; it is None after the first update. With
    `in_backward`, the last backward pass of a step updates the weights; if the step's loss is not finite, no
    pass does.
    """

    policy: PolicyModel
    trained: TrainedModel
    objective: Objective
    memory: StepMemory
    optimizer: Updater
    in_backward: OptimizerInBackward | None
    max_grad_norm: float  # 0: never clip
    step_zero: StepZero | None
    output: Path
    log: Log
    step_zero_gap: float | None = None
    has_updated: bool = False

    def __post_init__(self) -> None:
        self._logged: set[str] = set()

    def take(self, pairs: list[ScoredPair], number: int, lr: float) -> tuple[PairMetrics, int, float]:
        """Update the weights once; returns the step's metrics, the tokens run and the gradient's norm.

        The loss is the mean over the pairs. However they are split, and even if a pair is split into its
        answers, the gradient is the same. Raises `TrainingError` where the loss or the gradient is not
        finite.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        metrics, num_tokens = self._until_it_fits(lambda: self._accumulate(pairs))
        self._end_step_zero()
        grad_norm = self._update(pairs, metrics, number)
        return metrics, num_tokens, grad_norm

    @torch.no_grad()
    def measure(self, pairs: list[ScoredPair]) -> PairMetrics:
        """Metrics of the pairs under the policy as it is."""
        return self._until_it_fits(lambda: self._measure(pairs))

    @torch.no_grad()
    def check_base(self, pairs: list[ScoredPair], step_zero: StepZero) -> str:
        """Compare the policy, its adapter switched off, with the cache; returns `StepZero.conclude()`."""
        assert self.trained.adapted is not None
        before, self.step_zero = self.step_zero, step_zero
        with self.trained.adapted.disable_adapter():
            self._until_it_fits(lambda: self._run_all(pairs))
        step_zero, self.step_zero = self.step_zero, before
        return step_zero.conclude()

    def rows_with_nonfinite_loss(self, pairs: list[ScoredPair]) -> list[int]:
        """Rows of the pairs whose own loss is not finite."""
        return [
            scored.pair.row for scored in pairs if not math.isfinite(self.measure([scored]).means()["loss"])
        ]

    # -- split -> run -> losses -> backward -> update ---------------------------------------------------

    def _accumulate(self, pairs: list[ScoredPair]) -> tuple[PairMetrics, int]:
        """Add the gradient of the mean loss to the parameters', which have none before."""
        metrics, mean_tokens = PairMetrics(), mean_chosen_tokens(pairs)
        parts = self._split(pairs)
        for part in parts:
            logps = self._run(part)
            losses = policy_losses(self.objective, self._joined(part, logps), mean_tokens)
            metrics.add(losses.metrics)
            updates = part is parts[-1] and math.isfinite(metrics.means()["loss"])
            self._backward(part, logps, losses.total.sum() / len(pairs), updates=updates)
        return metrics, sum(group.num_tokens for part in parts for group in part.groups)

    def _measure(self, pairs: list[ScoredPair]) -> PairMetrics:
        metrics = PairMetrics()
        metrics.add(policy_losses(self.objective, self._run_all(pairs), mean_chosen_tokens(pairs)).metrics)
        return metrics

    def _run_all(self, pairs: list[ScoredPair]) -> list[tuple[Sequence[ScoredPair], CompletionLogps]]:
        parts = [Part([group], [self._pieces(group)]) for group in self._groups(pairs)]
        return [entry for part in parts for entry in self._joined(part, self._run(part))]

    def _split(self, pairs: list[ScoredPair]) -> list[Part]:
        """The step in parts, the largest first: smaller ones fit into the memory that larger ones have
        used.
        """
        groups = sorted(self._groups(pairs), key=lambda group: group.num_tokens, reverse=True)
        together = [groups] if self.objective.needs_whole_step else [[group] for group in groups]
        parts = [Part(some, [self._pieces(group) for group in some]) for some in together]
        if self.objective.needs_whole_step and parts[0].runs_twice:
            self._log_once(
                "this loss compares the pairs of a step with each other: steps that need several forests "
                "(`budget_tokens`) run each of them twice."
            )
        return parts

    def _run(self, part: Part) -> list[CompletionLogps]:
        """Log-probs of each piece, with gradients or, where the part is run twice, as leaves that collect
        them.
        """
        if not part.runs_twice:
            return self.policy(part.all_pieces)
        with torch.no_grad():
            return [logps.detach() for piece in part.all_pieces for logps in self.policy([piece])]

    def _joined(
        self, part: Part, logps: Sequence[CompletionLogps]
    ) -> list[tuple[Sequence[ScoredPair], CompletionLogps]]:
        """The pairs of each group with their log-probs, which step zero compares with the cache."""
        rest = iter(logps)
        joined: list[tuple[Sequence[ScoredPair], CompletionLogps]] = []
        for group, pieces in zip(part.groups, part.pieces, strict=True):
            found = join_logps([next(rest) for _ in pieces])
            if self.step_zero is not None:
                self.step_zero.check_pairs(group.pairs, found)
            joined.append((group.pairs, found))
        return joined

    def _backward(
        self, part: Part, logps: list[CompletionLogps], loss: torch.Tensor, *, updates: bool
    ) -> None:
        """Take the gradient of the loss; the step's last backward pass may update the weights."""
        if not part.runs_twice:
            self._pass_backward(loss.backward, updates=updates)
            return
        loss.backward()  # as far as the leaves
        pieces = part.all_pieces
        for place, (piece, leaf) in enumerate(zip(pieces, logps, strict=True)):
            (again,) = self.policy([piece])
            self._pass_backward(partial(again.backward, leaf), updates=updates and place == len(pieces) - 1)

    def _pass_backward(self, run: Callable[[], None], *, updates: bool) -> None:
        release_free_bytes(self.trained.model.device)
        with self.in_backward.last_backward() if self.in_backward and updates else nullcontext():
            run()

    def _update(self, pairs: list[ScoredPair], metrics: PairMetrics, number: int) -> float:
        """Update the weights, where the backward pass has not; returns the norm of the gradient."""
        if self.in_backward:
            has_changed, grad_norm = self.in_backward.has_begun, float(self.in_backward.end_step())
        else:
            largest, parameters = self.max_grad_norm or math.inf, self.trained.model.parameters()
            has_changed, grad_norm = False, float(torch.nn.utils.clip_grad_norm_(parameters, largest))
        loss = metrics.means()["loss"]
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise self._not_finite(pairs, number, loss, grad_norm, has_changed=has_changed)
        if not self.in_backward:
            self.optimizer.step()
        self.has_updated = True
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    # -- what fits --------------------------------------------------------------------------------------

    def _groups(self, pairs: list[ScoredPair]) -> list[Group]:
        return split_step(pairs, self.memory.micro_tokens, self.policy.count_tokens)

    def _pieces(self, group: Group) -> list[list[Completion]]:
        """The group's completions, to run at once; of a single pair that is too long, each answer by
        itself.
        """
        completions = completions_of(group.pairs)
        if group.num_tokens <= self.memory.pair_tokens or len(group.pairs) > 1:
            return [completions]
        self._log_once(
            f"pairs of more than {self.memory.pair_tokens:,} tokens do not fit at once (`budget_tokens`): "
            "they are run "
            "one answer at a time, and twice, with the same gradient."
        )
        return [[completion] for completion in completions]

    def _until_it_fits(self, run: Callable[[], Result]) -> Result:
        """Call `run`, and again with less at once where memory runs out."""
        while True:
            step_zero = deepcopy(self.step_zero)
            try:
                return run()
            except RuntimeError as error:
                self._check_unchanged(error)
                self.memory.save_more(error)
            self.step_zero = step_zero  # without what it noted of a part of the step
            self.trained.model.zero_grad(set_to_none=True)

    def _check_unchanged(self, error: RuntimeError) -> None:
        """Raise `TrainingError` where memory ran out while weights were being updated: the step cannot be
        repeated.
        """
        has_begun = self.in_backward is not None and self.in_backward.has_begun
        if has_begun and is_out_of_memory(error, self.trained.model.device):
            raise TrainingError(
                f"{first_line(error)} while weights were being updated (`free_gradients`): this step "
                "cannot be "
                "repeated.\nContinue from the last checkpoint with `resume` and a smaller `budget_tokens` or "
                "`gradient_checkpointing` full."
            ) from error

    # -- reporting --------------------------------------------------------------------------------------

    def _end_step_zero(self) -> None:
        """Log what the first step has shown; the first update makes the policy another model."""
        if self.step_zero is not None:
            self.log(self.step_zero.conclude())
            self.step_zero_gap = self.step_zero.largest_gap
            self.step_zero = None

    def _not_finite(
        self, pairs: list[ScoredPair], number: int, loss: float, grad_norm: float, *, has_changed: bool
    ) -> TrainingError:
        """The error that names the rows whose loss is not finite or, where only the gradient is not, all
        rows.
        """
        culprits = [] if has_changed else self.rows_with_nonfinite_loss(pairs)
        rows = culprits or [scored.pair.row for scored in pairs]
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        which = f"row {shown} of the data made it" if culprits else f"rows of the data in this step: {shown}"
        saved = find_checkpoints(self.output)
        kept = f" {saved[-1]} holds an earlier state." if saved else ""
        weights = (
            "were updated with it (`free_gradients`): continue from the last checkpoint"
            if has_changed
            else "were not updated"
        )
        lower = "Lower `lr`" + ("." if self.trained.precision == "fp32" else ", or use `precision` fp32.")
        return TrainingError(
            f"step {number}: loss {loss}, gradient norm {grad_norm}; {which}. The weights "
            f"{weights}.{kept}\n{lower}"
        )

    def _log_once(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            self.log(text)
