"""A weighted sum of losses as a pure function of log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpo_cache.losses import policy_losses, reference_losses
from dpo_cache.losses.entry import Loss
from dpo_cache.losses.metrics import ACCURACY, TIES
from dpo_cache.losses.reference_losses import divergence_scores
from dpo_cache.losses.table import LOSSES, LossSettings
from dpo_cache.losses.ties import margin_rounding


@dataclass(frozen=True)
class PairLogps:
    """The inputs of the losses: log-probs of P pairs in nats, one value a pair."""

    chosen: torch.Tensor  # the policy's log-probs, summed over tokens, with LD-DPO's weights if it is on
    rejected: torch.Tensor
    ref_chosen: torch.Tensor  # the same of the reference
    ref_rejected: torch.Tensor
    chosen_sums: torch.Tensor  # the policy's log-probs, each token once
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    weights: torch.Tensor  # weights of the preference losses: WPO's, or 1


@dataclass(frozen=True, kw_only=True)
class Objective(LossSettings):
    """A weighted sum of losses, loss -> weight, with their settings.

    The loss of a step is the mean over its pairs of `pair_losses`, plus the weighted router loss.
    """

    terms: dict[str, float]
    router_coefficient: float = 0.0
    token_rounding: float = 0.0  # nats by which rounding changes a token's log-prob, see `ties.py`

    @property
    def losses(self) -> list[Loss]:
        """The entries of its losses in the table."""
        return [LOSSES[name] for name in self.terms]

    @property
    def needs_whole_step(self) -> bool:
        """Return whether a pair's gradient depends on more than number and lengths of the step's pairs."""
        return bool(self.router_coefficient) or any(loss.whole_step for loss in self.losses)

    @property
    def has_reference(self) -> bool:
        """Return whether the rewards of its metrics are against the reference."""
        return not self._policy_only

    @property
    def prefers(self) -> bool:
        """Return whether any of its losses compares chosen with rejected answers."""
        return any(loss.prefers for loss in self.losses)

    @property
    def is_logistic(self) -> bool:
        """Return whether the loss is ln 2 for an untrained policy, and near 0 where margins are so large that
        the gradient is near 0, too.
        """
        return [loss.is_logistic for loss in self.losses] == [True] and not self.label_smoothing

    @property
    def _policy_only(self) -> list[Loss]:
        """The losses that compare answers without the reference, where no loss takes the reference."""
        if any(loss.has_reference for loss in self.losses):
            return []
        return [loss for loss in self.losses if loss.prefers]

    def pair_losses(self, pairs: PairLogps, mean_chosen_tokens: float) -> dict[str, torch.Tensor]:
        """The weighted `loss` of each pair, with its gradient, and its metrics under TRL's names.

        The router loss is added by `with_router_loss`.
        """
        by_name = {loss.name: self._losses_of(loss, pairs, mean_chosen_tokens) for loss in self.losses}
        total = torch.stack([weight * by_name[name] for name, weight in self.terms.items()]).sum(0)
        extra = {f"loss/{name}": value for name, value in by_name.items()} if len(by_name) > 1 else {}
        return {"loss": total, **self._metrics(pairs), **extra}

    def with_router_loss(self, losses: dict[str, torch.Tensor], aux: torch.Tensor) -> dict[str, torch.Tensor]:
        """The result of `pair_losses` plus the weighted router loss of the step, equal for each pair."""
        total = losses["loss"] + self.router_coefficient * aux
        return {**losses, "loss": total, "aux_loss": aux.expand_as(total)}

    def margin_rounding(self, pairs: PairLogps) -> torch.Tensor:
        """The largest margin of each pair's rewards that rounding explains."""
        per_token = not self.has_reference and self._policy_only[0].per_token
        lengths = pairs.chosen_lengths, pairs.rejected_lengths
        return self.beta * margin_rounding(self.token_rounding, *lengths, per_token=per_token)

    def _losses_of(self, loss: Loss, pairs: PairLogps, mean_chosen_tokens: float) -> torch.Tensor:
        known = self._inputs(pairs, mean_chosen_tokens)
        inputs = {key: known[key] for key in loss.inputs}
        settings = {key: getattr(self, key) for key in loss.settings}
        losses = loss_function(loss)(**inputs, **settings)
        return losses * pairs.weights if loss.has_reference else losses

    def _inputs(self, pairs: PairLogps, mean_chosen_tokens: float) -> dict[str, torch.Tensor | float]:
        """The inputs of loss functions, as `INPUTS` describes them."""
        chosen, rejected = self._scores(pairs)
        return {
            "margins": chosen - rejected,
            "mean_margins": chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths,
            "chosen_logratios": pairs.chosen - pairs.ref_chosen,
            "rejected_logratios": pairs.rejected - pairs.ref_rejected,
            "policy_margins": pairs.chosen - pairs.rejected,
            "reference_margins": pairs.ref_chosen - pairs.ref_rejected,
            "chosen_logps": pairs.chosen,
            "rejected_logps": pairs.rejected,
            "chosen_sums": pairs.chosen_sums,
            "chosen_lengths": pairs.chosen_lengths,
            "rejected_lengths": pairs.rejected_lengths,
            "mean_chosen_tokens": mean_chosen_tokens,
        }

    def _scores(self, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the chosen and of the rejected completions: log-ratios after the f-divergence."""
        chosen, rejected = pairs.chosen, pairs.rejected
        if not self.reference_free:
            chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
        divergence = self.f_divergence, self.f_alpha
        return divergence_scores(chosen, *divergence), divergence_scores(rejected, *divergence)

    def _metrics(self, pairs: PairLogps) -> dict[str, torch.Tensor]:
        """Rewards are against the reference. Where no loss has one, they are the policy's log-probs, as in
        TRL's trainers of those losses.
        """
        chosen, rejected = pairs.chosen, pairs.rejected
        if self.has_reference:
            chosen, rejected = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
        elif self._policy_only[0].per_token:
            chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        chosen, rejected = self.beta * chosen.detach(), self.beta * rejected.detach()
        margins = chosen - rejected
        ties = (margins.abs() <= self.margin_rounding(pairs)).to(margins.dtype)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            ACCURACY: torch.where(ties > 0, 0.5, (margins > 0).to(margins.dtype)),
            TIES: ties,
            "rewards/margins": margins,
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }


def loss_function(entry: Loss) -> Callable[..., torch.Tensor]:
    """The function of a loss, found by its name."""
    found = getattr(reference_losses, entry.function, None)
    return found or getattr(policy_losses, entry.function)  # type: ignore[no-any-return]
