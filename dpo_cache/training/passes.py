"""The policy over the pairs of a step, in forests that fit into memory: gradients, or values alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TypeVar

import torch

from dpo_cache.lm.device import autocast
from dpo_cache.lm.policy import CompletionLogps, completion_logps, count_tokens, join_logps
from dpo_cache.training.batches import Group, completions_of, split_step
from dpo_cache.training.metrics import PairMetrics
from dpo_cache.training.objective import Objective, mean_chosen_tokens, reference_logps
from dpo_cache.training.opening import Policy
from dpo_cache.training.step_zero import StepZero
from dpo_cache.training.thrift import Thrift
from dpo_cache.types import Completion, ScoredPair

Result = TypeVar("Result")
Part = tuple[Sequence[ScoredPair], CompletionLogps]


class Passes:
    """Forward and backward passes of a policy; `step_zero` looks on until it is set to None."""

    def __init__(self, policy: Policy, objective: Objective, thrift: Thrift, step_zero: StepZero | None, say: Callable[[str], None]):
        self.objective, self.thrift, self.step_zero = objective, thrift, step_zero
        self._policy, self._say = policy, say
        self._said: set[str] = set()

    def gradient(self, pairs: list[ScoredPair]) -> tuple[PairMetrics, int]:
        """Add the gradient of the step's mean loss to the parameters', which have none before; its metrics, and the tokens run.

        However the step is split into forests, and even a pair into its answers, the gradient is the same.
        """
        return self._until_it_fits(lambda: self._gradient(pairs))

    @torch.no_grad()
    def values(self, pairs: list[ScoredPair]) -> PairMetrics:
        """Metrics of the pairs under the policy as it is."""
        return self._until_it_fits(lambda: self._values(pairs))

    def _until_it_fits(self, run: Callable[[], Result]) -> Result:
        """What `run` gives, begun anew with less at once where memory runs out."""
        while True:
            step_zero = copy(self.step_zero)
            try:
                return run()
            except RuntimeError as error:
                self.thrift.save_more(error)
            self.step_zero = step_zero  # what was noted of a part of the step would be noted twice
            self._policy.model.zero_grad(set_to_none=True)

    def _gradient(self, pairs: list[ScoredPair]) -> tuple[PairMetrics, int]:
        metrics, groups, length = PairMetrics(), self._split(pairs), mean_chosen_tokens(pairs)
        together = [groups] if self.objective.needs_whole_step else [[group] for group in groups]
        for those in together:
            if sum(len(self._pieces(group)) for group in those) > 1:
                self._backward_twice(those, len(pairs), length, metrics)
            else:
                losses = self._losses([(those[0].pairs, self._checked_logps(those[0]))], length, metrics)
                (losses.sum() / len(pairs)).backward()
        return metrics, sum(group.num_tokens for group in groups)

    def _values(self, pairs: list[ScoredPair]) -> PairMetrics:
        metrics = PairMetrics()
        self._losses([(group.pairs, self._checked_logps(group)) for group in self._split(pairs)], mean_chosen_tokens(pairs), metrics)
        return metrics

    def _backward_twice(self, groups: Sequence[Group], num_pairs: int, mean_chosen_tokens: float, metrics: PairMetrics) -> None:
        """The gradient of losses of several forests that one forest's log-probs do not give.

        Each forest is run twice: without gradients, until the losses and their gradients by each token's log-prob
        are known, and again to carry those into the model.
        """
        if self.objective.needs_whole_step:
            self._say_once("this loss looks at a step's pairs together: steps that need several forests (--micro-tokens) run each of them twice.")
        pieces = [piece for group in groups for piece in self._pieces(group)]
        with torch.no_grad():
            found = [self._run(piece) for piece in pieces]
        leaves = [logps.detach() for logps in found]
        rest = iter(leaves)
        parts = [(group.pairs, self._checked(group, [next(rest) for _ in self._pieces(group)])) for group in groups]
        (self._losses(parts, mean_chosen_tokens, metrics).sum() / num_pairs).backward()
        for piece, leaf in zip(pieces, leaves, strict=True):
            self._run(piece).backward(leaf)

    def _losses(self, parts: Sequence[Part], mean_chosen_tokens: float, metrics: PairMetrics) -> torch.Tensor:
        """Losses of the pairs of some forests, noted in the metrics."""
        losses = self.objective.losses(parts, mean_chosen_tokens)
        metrics.add(losses.metrics)
        return losses.total

    def _checked_logps(self, group: Group) -> CompletionLogps:
        return self._checked(group, [self._run(piece) for piece in self._pieces(group)])

    def _checked(self, group: Group, found: Sequence[CompletionLogps]) -> CompletionLogps:
        """The log-probs of a group's pieces as one, compared with the cache at step zero."""
        logps = join_logps(found)
        if self.step_zero is not None:
            sums = logps.sums()
            self.step_zero.check(sums, torch.from_numpy(reference_logps(group.pairs)).to(sums.dtype).to(sums.device))
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
        return split_step(pairs, self.thrift.micro_tokens, self._count_tokens)

    def _pieces(self, group: Group) -> list[list[Completion]]:
        """What is run at once: the group's completions, or, of a single pair that is too long for the budget, each answer alone."""
        completions = completions_of(group.pairs)
        if group.num_tokens <= self.thrift.pair_tokens or len(group.pairs) > 1:
            return [completions]
        self._say_once(
            f"pairs of more than {self.thrift.pair_tokens:,} tokens do not fit at once (--micro-tokens): they are run one answer at a time, "
            "and twice, with the same gradient."
        )
        return [[completion] for completion in completions]

    def _count_tokens(self, completions: Sequence[Completion]) -> int:
        return count_tokens(completions, self._policy.attention)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)
