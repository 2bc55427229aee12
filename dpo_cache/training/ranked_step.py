"""One step of training on several ranks: each runs its own pairs, and all update with the same gradient.

If a rank has a part of several pieces, all ranks run such parts first, and twice, as `step.py` describes;
then the others. Losses that compare the pairs of a step are computed from the log-probs of all ranks, with
gradients with respect to the rank's own log-probs.

Gradients are averaged over the ranks, so each rank's losses are multiplied by the number of ranks; layer by
layer gradients are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.policy import count_tokens
from dpo_cache.losses.metrics import PairMetrics
from dpo_cache.planning.optimizer import optimizer_bytes
from dpo_cache.training.batches import Group
from dpo_cache.training.dealing import deal_pairs
from dpo_cache.training.equal_passes import EqualPasses, filler_of, plan_passes
from dpo_cache.training.exchange import end_run, exchange
from dpo_cache.training.layer_major import LayerMajorSteps
from dpo_cache.training.pair_logps import (
    RunPairs,
    mean_chosen_tokens,
    policy_losses,
    policy_losses_of_all,
)
from dpo_cache.training.setup import Setup
from dpo_cache.training.step import Result, TrainingStep
from dpo_cache.training.step_zero import StepZero
from dpo_cache.types import ScoredPair


def make_step(setup: Setup, policy: torch.nn.Module, step_zero: StepZero | None) -> TrainingStep:
    """The object that runs the steps of a run, on one rank or on several."""
    kind = TrainingStep if setup.ranks.size == 1 else RankedStep
    return kind(setup, policy, step_zero)


@dataclass
class RankedStep(TrainingStep):
    """Every method is called by all ranks, with the same pairs; all return the same values and raise the same
    errors.
    """

    _reduces: bool = True  # True if backward passes add up gradients over the ranks
    _is_try: bool = False  # True if no weight is updated
    _remarks: list[str] = field(default_factory=list)  # remarks of this rank that are not logged yet

    def try_step(self, pairs: list[ScoredPair]) -> None:
        """Run a step without its update. If memory runs out on a rank, all repeat it with fewer tokens at
        once; under FSDP2, where a step cannot be repeated, this raises `TrainingError`.
        """
        num_compared = self._num_compared
        self._reduces, self._is_try = self.setup.ranks.shards, True  # FSDP2 always adds them up
        try:
            self._until_it_fits(lambda: self._accumulate(pairs))
        finally:
            self._reduces, self._is_try = True, False
        self._forget(num_compared)

    @torch.no_grad()
    def measure(self, pairs: list[ScoredPair]) -> PairMetrics:
        def run() -> PairMetrics:
            entries, metrics = self._run_all(pairs), PairMetrics()
            if entries or self.setup.objective.needs_whole_step:
                metrics.add(self._losses(entries, mean_chosen_tokens(pairs))[0])
            return PairMetrics.merged(self._exchange(metrics))

        return self._until_it_fits(run)

    # -- deal -> run -> losses -> backward ---------------------------------------------------------------

    def _accumulate(self, pairs: list[ScoredPair]) -> tuple[PairMetrics, int]:
        num_compared, parts = self._num_compared, self._split(self._deal(pairs))
        if self.setup.layer_major is not None:
            metrics = self._run_layers(self.setup.layer_major, parts, pairs)
        else:
            metrics = self._run_parts(parts, pairs)
        self._share_notes(num_compared)
        found = self._exchange((metrics, sum(group.num_tokens for part in parts for group in part)))
        return PairMetrics.merged(metrics for metrics, _ in found), sum(tokens for _, tokens in found)

    def _run_parts(self, parts: list[list[Group]], pairs: list[ScoredPair]) -> PairMetrics:
        """Run each part through the whole model, forward and backward."""
        twice, once = self._by_runs(parts)
        passes_twice, passes_once = self._plan(twice, pairs), self._plan(once, pairs)
        metrics = PairMetrics()
        self._run_twice(twice, passes_twice, pairs, metrics, ends_step=not passes_once)
        self._run_once(once, passes_once, pairs, metrics)
        return metrics

    def _run_twice(
        self,
        parts: list[list[Group]],
        passes: EqualPasses,
        pairs: list[ScoredPair],
        metrics: PairMetrics,
        *,
        ends_step: bool,
    ) -> None:
        """Run the parts without gradients, compute the gradients of their losses, and propagate these into
        the model.
        """
        with torch.no_grad():
            leaves = [logps.detach() for logps in passes.run_all()]
        rest = iter(leaves)
        for part in parts:
            entries = self._by_group(part, list(islice(rest, len(self._pieces(part)))))
            losses, total = self._losses(entries, mean_chosen_tokens(pairs))
            metrics.add(losses)
            if entries:
                (total * self.setup.ranks.size / len(pairs)).backward()  # stops at the leaves
        for place in range(len(passes)):
            is_last = ends_step and place == len(passes) - 1
            with self._reducing(is_last=is_last):
                run = passes.run_again(place, leaves)
                self._pass_backward(run, updates=self._updates(metrics, is_last=is_last))

    def _run_once(
        self, parts: list[list[Group]], passes: EqualPasses, pairs: list[ScoredPair], metrics: PairMetrics
    ) -> None:
        """Run the parts, which have one piece or none, and compute the gradient of their losses."""
        for place in range(len(passes)):
            is_last = place == len(passes) - 1
            with self._reducing(is_last=is_last):
                logps, loss = passes.run(place)
                for part in parts[place : place + 1]:
                    entries = self._by_group(part, [] if logps is None else [logps])
                    losses, total = self._losses(entries, mean_chosen_tokens(pairs))
                    metrics.add(losses)
                    loss = loss + total * self.setup.ranks.size / len(pairs)
                self._pass_backward(loss.backward, updates=self._updates(metrics, is_last=is_last))

    def _run_layers(
        self, steps: LayerMajorSteps, parts: list[list[Group]], pairs: list[ScoredPair]
    ) -> PairMetrics:
        """Run all parts layer by layer. A rank without parts runs a filler, for its share of the gradient."""
        metrics, pieces = PairMetrics(), [piece for part in parts for piece in self._pieces(part)]
        steps.forward(pieces or [[filler_of(pairs)]])
        places = iter(range(len(pieces)))
        with steps.top() as run:
            for part in parts:
                here = list(islice(places, len(self._pieces(part))))
                entries = self._by_group(part, [run.logps(place) for place in here])
                losses, total = self._losses(entries, mean_chosen_tokens(pairs))
                metrics.add(losses)
                if entries:
                    (total / len(pairs)).backward()
                for place in here:
                    run.end_top(place)
            if not pieces:
                (0.0 * run.logps(0).tokens_T.sum()).backward()
                run.end_top(0)
        if not any(self._exchange(not metrics.is_finite)):
            steps.backward(is_try=not self._reduces)
        return metrics

    def _run_all(self, pairs: list[ScoredPair]) -> list[RunPairs]:
        """Run the pairs of all ranks without gradients. Returns those of this rank."""
        num_compared, own = self._num_compared, self._deal(pairs)
        if self.setup.layer_major is not None:
            entries = super()._run_all(own) if own else []
        else:
            parts = [[group] for group in self._groups(own)]
            rest = iter(list(self._plan(parts, pairs).run_all()))
            entries = [
                entry
                for part in parts
                for entry in self._by_group(part, list(islice(rest, len(self._pieces(part)))))
            ]
        self._share_notes(num_compared)
        return entries

    # -- the same on all ranks ------------------------------------------------------------------------

    def _deal(self, pairs: list[ScoredPair]) -> list[ScoredPair]:
        """The pairs of this rank."""
        ranks, count = self.setup.ranks, partial(count_tokens, self.setup.policy.attention)
        return deal_pairs(pairs, ranks.size, count)[ranks.index]

    def _by_runs(self, parts: list[list[Group]]) -> tuple[list[list[Group]], list[list[Group]]]:
        """The parts of several pieces, which are run twice, and the others."""
        has_several = [len(self._pieces(part)) > 1 for part in parts]
        if self.setup.objective.needs_whole_step:  # one part has the pairs of all ranks
            has_several = [any(self._exchange(has_several[0]))]
        together = list(zip(parts, has_several, strict=True))
        return [part for part, several in together if several], [
            part for part, several in together if not several
        ]

    def _plan(self, parts: Sequence[list[Group]], pairs: list[ScoredPair]) -> EqualPasses:
        pieces = [piece for part in parts for piece in self._pieces(part)]
        return plan_passes(self.policy, self.setup.policy.attention, pieces, pairs, self._exchange)

    def _losses(
        self, entries: Sequence[RunPairs], mean_tokens: float
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Losses and metrics of this rank's pairs; and the loss of which this rank computes the gradient, a
        sum over pairs.
        """
        objective, ranks = self.setup.objective, self.setup.ranks
        if not objective.needs_whole_step:
            losses = policy_losses(objective, entries, mean_tokens)
            return losses, losses["loss"].sum()
        losses, own = policy_losses_of_all(
            objective, entries, mean_tokens, self._exchange, ranks.index, self.setup.device
        )
        return {name: values[own] for name, values in losses.items()}, losses["loss"].sum()

    def _reducing(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """The context of a run with gradients: DDP adds them up in the last run of a step."""
        if isinstance(self.policy, DistributedDataParallel) and not (is_last and self._reduces):
            return self.policy.no_sync()
        return nullcontext()

    def _updates(self, metrics: PairMetrics, *, is_last: bool) -> bool:
        """Return whether a backward pass may update the weights; `metrics` are those of the step so far."""
        if self.setup.in_backward is None or self._is_try or not is_last:
            return False
        return not any(self._exchange(not metrics.is_finite))

    def _share_notes(self, num_compared: int) -> None:
        """Share the remarks of each rank, and the completions that step zero has compared after the first
        `num_compared`.
        """
        compared = self.step_zero.compared[num_compared:] if self.step_zero else []
        found = self._exchange((compared, self._remarks))
        self._remarks = []
        for text in [text for _, remarks in found for text in remarks]:
            super()._log_once(text)
        if self.step_zero:
            self.step_zero.compared[num_compared:] = [one for of_rank, _ in found for one in of_rank]

    def _log_once(self, text: str) -> None:
        self._remarks.append(text)  # logged by the main rank

    def _clip(self, max_norm: float) -> float:
        norms = self.setup.ranks.gather(super()._clip(max_norm))
        # a layer-major step whose loss is not finite does not add up gradients
        return next((norm for norm in norms if not math.isfinite(norm)), norms[self.setup.ranks.index])

    # -- fitting into memory --------------------------------------------------------------------------------

    def _until_it_fits(self, run: Callable[[], Result]) -> Result:
        """Call `run`, and again with fewer tokens at once if memory runs out on a rank. That needs runs in
        which the ranks only exchange values, since only such runs can be ended on all of them.
        """
        can_repeat = not self.setup.ranks.shards and not (torch.is_grad_enabled() and self._reduces)
        while True:
            num_compared = self._num_compared
            try:
                result = run()
                if can_repeat:
                    self._exchange(None)
                return result
            except RuntimeError as error:
                if not is_out_of_memory(error, self.setup.device):
                    raise
                if not can_repeat:
                    raise self._cannot_repeat(error) from error
                end_run(self.setup.ranks, error)
                self.setup.step_memory.save_more(error)
            self._forget(num_compared)

    def _update(self, pairs: list[ScoredPair], metrics: PairMetrics, number: int) -> float:
        try:
            return super()._update(pairs, metrics, number)
        except RuntimeError as error:  # the optimizer makes its state in the first update
            if is_out_of_memory(error, self.setup.device):
                raise self._cannot_repeat(error) from error
            raise

    def _state_to_come(self) -> torch.Tensor | None:
        """A tensor that reserves the device memory that the first update takes for the optimizer's state."""
        setup, device = self.setup, self.setup.device
        if device.type == "cpu" or setup.checkpoint is not None:
            return None
        here = [one for one in setup.optimizer.parameters if one.device.type == device.type]
        num_bytes = optimizer_bytes(here, setup.options.optimizer, setup.options.rounding)
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def _exchange(self, value: Any) -> list[Any]:
        return exchange(self.setup.ranks, value)

    @property
    def _num_compared(self) -> int:
        return len(self.step_zero.compared) if self.step_zero else 0

    def _forget(self, num_compared: int) -> None:
        """Forget a run: its gradients, and the completions that step zero compared after so many."""
        if self.step_zero:
            del self.step_zero.compared[num_compared:]
        self.setup.optimizer.zero_grad()
        if self.setup.layer_major is not None:
            self.setup.layer_major.drop()

    def _cannot_repeat(self, error: RuntimeError) -> TrainingError:
        ranks = self.setup.ranks
        return TrainingError(
            f"{first_line(error)} on rank {ranks.index}, in a run that needs all ranks at once, so none can "
            f"repeat it.\nContinue from the last checkpoint with `resume` and "
            f"{self.setup.step_memory.advice(shards=ranks.shards)}."
        )
