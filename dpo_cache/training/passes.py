"""The policy over the pairs of a step, in forests that fit into memory: gradients, or values alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.device import autocast, release_free_bytes
from dpo_cache.lm.policy import CompletionLogps, completion_logps, count_tokens, join_logps
from dpo_cache.log import Log
from dpo_cache.losses.metrics import PairMetrics
from dpo_cache.losses.objective import Objective
from dpo_cache.training.batches import Group, completions_of, split_step
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.pair_logps import Part, mean_chosen_tokens, policy_losses
from dpo_cache.training.step_memory import StepMemory
from dpo_cache.training.step_zero import StepZero
from dpo_cache.types import Completion, ScoredPair

Result = TypeVar("Result")


class Passes:
    """Forward and backward passes of a policy; `step_zero` looks on until it is set to None.

    With `in_backward`, the last backward pass of a step updates the weights; where a step's loss is not
    finite, none does.
    """

    def __init__(
        self,
        policy: TrainedModel,
        objective: Objective,
        step_memory: StepMemory,
        step_zero: StepZero | None,
        log: Log,
        in_backward: OptimizerInBackward | None = None,
    ):
        self.objective, self.step_memory, self.step_zero = objective, step_memory, step_zero
        self._policy, self._log, self._freed = policy, log, in_backward
        self._logged: set[str] = set()

    def gradient(self, pairs: list[ScoredPair]) -> tuple[PairMetrics, int]:
        """Add the gradient of the step's mean loss to the parameters', which have none before; its metrics,
        and the tokens run.

        However the step is split into forests, and even a pair into its answers, the gradient is the same.
        """
        return self._until_it_fits(lambda: self._gradient(pairs))

    @torch.no_grad()
    def values(self, pairs: list[ScoredPair]) -> PairMetrics:
        """Metrics of the pairs under the policy as it is."""
        return self._until_it_fits(lambda: self._values(pairs))

    @torch.no_grad()
    def check_base(self, pairs: list[ScoredPair], step_zero: StepZero) -> str:
        """Compare the policy, its adapter switched off, with the cache; what `StepZero.conclude` says of
        it.
        """
        assert self._policy.adapted is not None
        own, self.step_zero = self.step_zero, step_zero
        with self._policy.adapted.disable_adapter():
            self._until_it_fits(lambda: [self._checked_logps(group) for group in self._split(pairs)])
        step_zero, self.step_zero = self.step_zero, own
        return step_zero.conclude()

    def rows_with_nonfinite_loss(self, pairs: list[ScoredPair]) -> list[int]:
        """Rows of the pairs whose own loss is not finite."""
        return [
            scored.pair.row for scored in pairs if not math.isfinite(self.values([scored]).means()["loss"])
        ]

    def _until_it_fits(self, run: Callable[[], Result]) -> Result:
        """What `run` gives, begun anew with less at once where memory runs out."""
        while True:
            step_zero = deepcopy(self.step_zero)
            try:
                return run()
            except RuntimeError as error:
                if (
                    self._freed
                    and self._freed.has_begun
                    and is_out_of_memory(error, self._policy.model.device)
                ):
                    raise TrainingError(
                        f"{first_line(error)} while weights were being updated (--free-gradients): this "
                        "step cannot be taken again.\n"
                        "Go on from the last checkpoint with --resume and a smaller --micro-tokens or "
                        "--gradient-checkpointing full."
                    ) from error
                self.step_memory.save_more(error)
            self.step_zero = step_zero  # what was noted of a part of the step would be noted twice
            self._policy.model.zero_grad(set_to_none=True)

    def _gradient(self, pairs: list[ScoredPair]) -> tuple[PairMetrics, int]:
        metrics, length = PairMetrics(), mean_chosen_tokens(pairs)
        groups = sorted(
            self._split(pairs), key=lambda group: group.num_tokens, reverse=True
        )  # smaller ones fit where larger ones were
        together = [groups] if self.objective.needs_whole_step else [[group] for group in groups]
        for place, those in enumerate(together):
            is_last = place == len(together) - 1
            if sum(len(self._pieces(group)) for group in those) > 1:
                self._backward_twice(those, len(pairs), length, metrics, is_last)
            else:
                losses = self._losses([(those[0].pairs, self._checked_logps(those[0]))], length, metrics)
                self._backward((losses.sum() / len(pairs)).backward, metrics, is_last)
        return metrics, sum(group.num_tokens for group in groups)

    def _values(self, pairs: list[ScoredPair]) -> PairMetrics:
        metrics = PairMetrics()
        self._losses(
            [(group.pairs, self._checked_logps(group)) for group in self._split(pairs)],
            mean_chosen_tokens(pairs),
            metrics,
        )
        return metrics

    def _backward_twice(
        self,
        groups: Sequence[Group],
        num_pairs: int,
        mean_chosen_tokens: float,
        metrics: PairMetrics,
        is_last: bool,
    ) -> None:
        """The gradient of losses of several forests that one forest's log-probs do not give.

        Each forest is run twice: without gradients, until the losses and their gradients by each token's
        log-prob are known, and again to carry those into the model.
        """
        if self.objective.needs_whole_step:
            self._log_once(
                "this loss looks at a step's pairs together: steps that need several forests "
                "(--micro-tokens) run each of them twice."
            )
        pieces = [piece for group in groups for piece in self._pieces(group)]
        with torch.no_grad():
            found = [self._run(piece) for piece in pieces]
        leaves = [logps.detach() for logps in found]
        rest = iter(leaves)
        parts = [
            (group.pairs, self._checked(group, [next(rest) for _ in self._pieces(group)])) for group in groups
        ]
        (self._losses(parts, mean_chosen_tokens, metrics).sum() / num_pairs).backward()
        for place, (piece, leaf) in enumerate(zip(pieces, leaves, strict=True)):
            self._backward(
                partial(self._run(piece).backward, leaf), metrics, is_last and place == len(pieces) - 1
            )

    def _backward(self, run: Callable[[], None], metrics: PairMetrics, is_last: bool) -> None:
        """A backward pass; the last of a step updates the weights, where that is asked for and the step's
        loss is finite.
        """
        release_free_bytes(self._policy.model.device)
        if not (is_last and self._freed):
            run()
        elif math.isfinite(metrics.means()["loss"]):
            with self._freed.last_backward():
                run()

    def _losses(self, parts: Sequence[Part], mean_chosen_tokens: float, metrics: PairMetrics) -> torch.Tensor:
        """Losses of the pairs of some forests, noted in the metrics."""
        losses = policy_losses(self.objective, parts, mean_chosen_tokens)
        metrics.add(losses.metrics)
        return losses.total

    def _checked_logps(self, group: Group) -> CompletionLogps:
        return self._checked(group, [self._run(piece) for piece in self._pieces(group)])

    def _checked(self, group: Group, found: Sequence[CompletionLogps]) -> CompletionLogps:
        """The log-probs of a group's pieces as one, compared with the cache at step zero."""
        logps = join_logps(found)
        if self.step_zero is not None and not self.step_zero.has_enough:
            tokens = logps.tokens_T.detach().float().cpu().split(logps.lengths)
            scores = [scored.ref_chosen for scored in group.pairs] + [
                scored.ref_rejected for scored in group.pairs
            ]
            self.step_zero.check(
                [values.numpy() for values in tokens], scores, [scored.pair.row for scored in group.pairs] * 2
            )
        return logps

    def _run(self, completions: Sequence[Completion]) -> CompletionLogps:
        objective, policy = self.objective, self._policy
        with autocast(policy.model.device, policy.precision):
            return completion_logps(
                policy.model,
                completions,
                policy.attention,
                with_squares=objective.wpo != "off",
                with_routing=bool(objective.router_coefficient),
            )

    def _split(self, pairs: list[ScoredPair]) -> list[Group]:
        return split_step(pairs, self.step_memory.micro_tokens, self._count_tokens)

    def _pieces(self, group: Group) -> list[list[Completion]]:
        """What is run at once: the group's completions, or, of a single pair that is too long for the budget,
        each answer alone.
        """
        completions = completions_of(group.pairs)
        if group.num_tokens <= self.step_memory.pair_tokens or len(group.pairs) > 1:
            return [completions]
        self._log_once(
            f"pairs of more than {self.step_memory.pair_tokens:,} tokens do not fit at once "
            "(--micro-tokens): they are run one answer at a time, "
            "and twice, with the same gradient."
        )
        return [[completion] for completion in completions]

    def _count_tokens(self, completions: Sequence[Completion]) -> int:
        return count_tokens(completions, self._policy.attention)

    def _log_once(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            self._log(text)
