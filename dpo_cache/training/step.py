"""One step of training: pairs -> parts that fit into memory -> log-probs -> losses -> gradient -> update.

A part of a step is a list of groups whose losses are computed together; a piece is a list of completions that
are run at once. A part of one piece takes the gradient of its losses through that run. A part of several
pieces runs each piece twice: without gradients, to compute the losses and their gradients with respect to
each token's log-prob, and again to propagate these gradients into the model, with one piece in memory at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

import torch

from dpo_cache.errors import TrainingError, first_line, shown_rows
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.device import release_free_bytes
from dpo_cache.lm.policy import CompletionLogps, count_tokens, join_logps
from dpo_cache.losses.metrics import Metrics, PairMetrics
from dpo_cache.training.batches import Group, completions_of, split_step, stream_pairs
from dpo_cache.training.layer_major import LayerMajorSteps
from dpo_cache.training.optim.clipping import clip_gradient
from dpo_cache.training.output.run_start import find_checkpoints
from dpo_cache.training.pair_logps import RunPairs, evaluated_at_once, mean_chosen_tokens, policy_losses
from dpo_cache.training.setup import Setup
from dpo_cache.training.step_zero import StepZero
from dpo_cache.types import Completion, ScoredPair

Result = TypeVar("Result")


@dataclass
class TrainingStep:
    """Updates the policy of a run, one step at a time.

    `step_zero` compares the first log-probs with the cache; it is None after the first update. If
    gradients are not kept, the last backward pass of a step updates the weights; if the step's loss is not
    finite, no pass does.
    """

    setup: Setup
    policy: torch.nn.Module  # `setup.policy_model()`, or a wrapper of it
    step_zero: StepZero | None
    step_zero_gap: float | None = None
    has_updated: bool = False
    _logged: set[str] = field(default_factory=set)

    def take(self, pairs: list[ScoredPair], number: int, lr: float) -> tuple[PairMetrics, int, float]:
        """Update the weights once. Returns the step's metrics, the tokens run and the gradient's norm.

        The loss is the mean over the pairs. However the pairs are split, and even if a pair is split into its
        answers, the gradient is the same. Raises `TrainingError` where the loss or the gradient is not
        finite.
        """
        for parameters in self.setup.optimizer.param_groups:
            parameters["lr"] = lr
        metrics, num_tokens = self._until_it_fits(lambda: self._accumulate(pairs))
        if self.step_zero is not None:  # after the first update the policy is another model
            self.setup.log(self.step_zero.conclude())
            self.step_zero_gap, self.step_zero = self.step_zero.largest_gap, None
        return metrics, num_tokens, self._update(pairs, metrics, number)

    def evaluate(self, number: int) -> Metrics:
        """Means over the evaluation pairs under the policy after the step of this number.

        Raises `TrainingError` that names the rows whose loss is not finite, and `StepZeroError`.
        """
        data, metrics = self.setup.data, PairMetrics()
        assert data.eval_pairs is not None
        at_once = evaluated_at_once(
            self.setup.objective, self.setup.options.batch_size, self.setup.ranks.size
        )
        stream = stream_pairs(data.eval_pairs, data.eval_selected, shuffle=False, seed=0, epoch=0)
        while pairs := list(islice(stream, at_once)):
            values = self.measure(pairs)
            if not math.isfinite(values.means()["loss"]):
                rows = shown_rows(self.rows_with_nonfinite_loss(pairs))
                raise TrainingError(
                    f"the evaluation after step {number} gives a loss that is not finite, by row {rows} of "
                    "the data.\nNo model was saved. Lower `lr`."
                )
            metrics.merge(values)
            if self.step_zero is not None:
                self.step_zero.stop_if_wrong()
        return metrics.means()

    @torch.no_grad()
    def measure(self, pairs: list[ScoredPair]) -> PairMetrics:
        """Losses and metrics of the pairs, without an update."""
        metrics, mean_tokens = PairMetrics(), mean_chosen_tokens(pairs)
        metrics.add(
            self._until_it_fits(
                lambda: policy_losses(self.setup.objective, self._run_all(pairs), mean_tokens)
            )
        )
        return metrics

    @torch.no_grad()
    def compare(self, pairs: list[ScoredPair]) -> None:
        """Compare the policy with the cache on these pairs. Raises `StepZeroError`."""
        assert self.step_zero is not None
        self._until_it_fits(lambda: self._run_all(pairs))
        self.step_zero.stop_if_wrong()

    @torch.no_grad()
    def check_base(self, pairs: list[ScoredPair], step_zero: StepZero) -> str:
        """Compare the policy without its adapter with the cache. Returns `StepZero.conclude()`."""
        adapted = self.setup.policy.adapted
        assert adapted is not None
        before, self.step_zero = self.step_zero, step_zero
        with adapted.disable_adapter():
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
        """Compute the gradient of the mean loss; the parameters have none before."""
        if self.setup.layer_major is not None:
            return self._accumulate_by_layer(self.setup.layer_major, pairs)
        metrics, mean_tokens = PairMetrics(), mean_chosen_tokens(pairs)
        parts = self._split(pairs)
        for part in parts:
            logps = self._run(part)
            losses = policy_losses(self.setup.objective, self._by_group(part, logps), mean_tokens)
            metrics.add(losses)
            updates = part is parts[-1] and math.isfinite(metrics.means()["loss"])
            self._backward(part, logps, losses["loss"].sum() / len(pairs), updates=updates)
        return metrics, sum(group.num_tokens for part in parts for group in part)

    def _accumulate_by_layer(
        self, steps: LayerMajorSteps, pairs: list[ScoredPair]
    ) -> tuple[PairMetrics, int]:
        """Compute the same layer by layer: all pieces of the step pass through one layer before the next."""
        metrics, mean_tokens = PairMetrics(), mean_chosen_tokens(pairs)
        parts = self._split(pairs)
        pieces = [self._pieces(part) for part in parts]
        steps.forward([piece for of_part in pieces for piece in of_part])
        places = iter(range(sum(map(len, pieces))))
        with steps.top() as run:
            for part, of_part in zip(parts, pieces, strict=True):
                here = list(islice(places, len(of_part)))
                logps = [run.logps(place) for place in here]
                losses = policy_losses(self.setup.objective, self._by_group(part, logps), mean_tokens)
                metrics.add(losses)
                (losses["loss"].sum() / len(pairs)).backward()
                for place in here:
                    run.end_top(place)
        if math.isfinite(metrics.means()["loss"]):
            steps.backward()
        return metrics, sum(group.num_tokens for part in parts for group in part)

    def _run_all(self, pairs: list[ScoredPair]) -> list[RunPairs]:
        parts = [[group] for group in self._groups(pairs)]
        if self.setup.layer_major is not None:
            pieces = [piece for part in parts for piece in self._pieces(part)]
            rest = iter(self.setup.layer_major.logps(pieces))
            return [
                entry
                for part in parts
                for entry in self._by_group(part, list(islice(rest, len(self._pieces(part)))))
            ]
        return [entry for part in parts for entry in self._by_group(part, self._run(part))]

    def _split(self, pairs: list[ScoredPair]) -> list[list[Group]]:
        """The parts of the step, the largest first, so that the others fit into the memory that it used."""
        groups = sorted(self._groups(pairs), key=lambda group: group.num_tokens, reverse=True)
        if not self.setup.objective.needs_whole_step:
            return [[group] for group in groups]
        if len(self._pieces(groups)) > 1:
            self._log_once(
                "this loss compares the pairs of a step with each other: steps that need several forests "
                "(`budget_tokens`) run each of them twice."
            )
        return [groups]

    def _run(self, part: list[Group]) -> list[CompletionLogps]:
        """Log-probs of each piece: with gradients or, of several pieces, as leaves that collect them."""
        pieces = self._pieces(part)
        if len(pieces) == 1:
            return self.policy(pieces)
        with torch.no_grad():
            return [logps.detach() for piece in pieces for logps in self.policy([piece])]

    def _by_group(self, part: list[Group], logps: list[CompletionLogps]) -> list[RunPairs]:
        """The pairs of each group with their log-probs, which step zero compares with the cache here."""
        rest = iter(logps)
        found: list[RunPairs] = []
        for group in part:
            joined = join_logps(list(islice(rest, len(self._pieces([group])))))
            if self.step_zero is not None:
                self.step_zero.check_pairs(group.pairs, joined)
            found.append((group.pairs, joined))
        return found

    def _backward(
        self, part: list[Group], logps: list[CompletionLogps], loss: torch.Tensor, *, updates: bool
    ) -> None:
        """Compute the gradient of the loss; the step's last backward pass may update the weights."""
        pieces = self._pieces(part)
        if len(pieces) == 1:
            self._pass_backward(loss.backward, updates=updates)
            return
        loss.backward()  # stops at the leaves
        for place, (piece, leaf) in enumerate(zip(pieces, logps, strict=True)):
            (again,) = self.policy([piece])
            self._pass_backward(partial(again.backward, leaf), updates=updates and place == len(pieces) - 1)

    def _pass_backward(self, run: Callable[[], None], *, updates: bool) -> None:
        release_free_bytes(self.setup.policy.model.device)
        in_backward = self.setup.in_backward
        with in_backward.last_backward() if in_backward and updates else nullcontext():
            run()

    def _update(self, pairs: list[ScoredPair], metrics: PairMetrics, number: int) -> float:
        """Update the weights, unless the backward pass has; returns the norm of the gradient."""
        setup, has_changed = self.setup, False
        if setup.in_backward:
            has_changed, grad_norm = setup.in_backward.has_begun, float(setup.in_backward.end_step())
        else:
            grad_norm = self._clip(setup.options.max_grad_norm or math.inf)
        loss = metrics.means()["loss"]
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise self._not_finite(pairs, number, loss, grad_norm, has_changed=has_changed)
        if not setup.in_backward:
            self._apply()
        self.has_updated = True
        setup.optimizer.zero_grad()
        if setup.layer_major is not None:
            setup.layer_major.gradients.end_step()
        return grad_norm

    def _clip(self, max_norm: float) -> float:
        """Clip the gradient, wherever it is kept; returns its norm before."""
        steps, optimizer = self.setup.layer_major, self.setup.optimizer
        if steps is not None and steps.gradients.is_on_host:
            return steps.gradients.clip(optimizer.parameters, max_norm)
        return float(clip_gradient(optimizer.parameters, max_norm, self.setup.ranks))

    def _apply(self) -> None:
        """Update the weights by the gradient, wherever it is kept."""
        steps, optimizer = self.setup.layer_major, self.setup.optimizer
        if steps is not None and steps.gradients.is_on_host:
            steps.gradients.update(optimizer)
        else:
            optimizer.step()

    # -- fitting into memory ------------------------------------------------------------------------------

    def _groups(self, pairs: list[ScoredPair]) -> list[Group]:
        count = partial(count_tokens, self.setup.policy.attention)
        return split_step(pairs, self.setup.step_memory.micro_tokens, count)

    def _pieces(self, part: list[Group]) -> list[list[Completion]]:
        """The completions of each group; for a group of one pair that is too long, each of its answers."""
        pieces: list[list[Completion]] = []
        largest = self.setup.step_memory.pair_tokens
        for group in part:
            completions = completions_of(group.pairs)
            if group.num_tokens <= largest or len(group.pairs) > 1:
                pieces.append(completions)
                continue
            self._log_once(
                f"pairs of more than {largest:,} tokens do not fit at once (`budget_tokens`): they are run "
                "one answer at a time, and twice, with the same gradient."
            )
            pieces += [[completion] for completion in completions]
        return pieces

    def _until_it_fits(self, run: Callable[[], Result]) -> Result:
        """Call `run`, and again with fewer tokens at once if memory runs out."""
        while True:
            num_compared = len(self.step_zero.compared) if self.step_zero else 0
            try:
                return run()
            except RuntimeError as error:
                self._check_unchanged(error)
                self.setup.step_memory.save_more(error)
            if self.step_zero:
                del self.step_zero.compared[num_compared:]  # the step is repeated
            self.setup.policy.model.zero_grad(set_to_none=True)
            if self.setup.layer_major is not None:
                self.setup.layer_major.drop()

    def _check_unchanged(self, error: RuntimeError) -> None:
        """Raise `TrainingError` if memory ran out while weights were being updated: the step cannot be
        repeated.
        """
        in_backward = self.setup.in_backward
        has_begun = in_backward is not None and in_backward.has_begun
        if has_begun and is_out_of_memory(error, self.setup.policy.model.device):
            raise TrainingError(
                f"{first_line(error)} while weights were being updated (`place` gradients=none): this step "
                "cannot be repeated.\nContinue from the last checkpoint with `resume` and a smaller "
                "`budget_tokens` or `gradient_checkpointing` full."
            ) from error

    # -- reporting --------------------------------------------------------------------------------------

    def _not_finite(
        self, pairs: list[ScoredPair], number: int, loss: float, grad_norm: float, *, has_changed: bool
    ) -> TrainingError:
        """The error that names the rows whose loss is not finite, or all rows if only the gradient is not."""
        culprits = [] if has_changed else self.rows_with_nonfinite_loss(pairs)
        which = f"rows of the data in this step: {shown_rows([scored.pair.row for scored in pairs])}"
        if culprits:
            which = f"row {shown_rows(culprits)} of the data made it"
        weights = "were not updated"
        if has_changed:
            weights = "were updated with it (`place` gradients=none): continue from the last checkpoint"
        saved = find_checkpoints(self.setup.output)
        kept = f" {saved[-1]} holds an earlier state." if saved else ""
        lower = "." if self.setup.policy.precision == "fp32" else ", or use `precision` fp32."
        return TrainingError(
            f"step {number}: loss {loss}, gradient norm {grad_norm}; {which}. The weights "
            f"{weights}.{kept}\nLower `lr`{lower}"
        )

    def _log_once(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            self.setup.log(text)
