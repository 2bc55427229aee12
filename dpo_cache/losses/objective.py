"""A weighted sum of losses as a pure function of log-probs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpo_cache.losses import policy_losses, reference_losses
from dpo_cache.losses.entry import Loss
from dpo_cache.losses.table import LOSSES, LossSettings


@dataclass(frozen=True)
class PairLogps:
    """The inputs of the losses: log-probs of P pairs in nats, one value a pair."""

    chosen: torch.Tensor  # of the policy, summed over tokens, by LD-DPO's weights if it is on
    rejected: torch.Tensor
    ref_chosen: torch.Tensor  # the same of the reference
    ref_rejected: torch.Tensor
    chosen_sums: torch.Tensor  # of the policy, each token once
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    weights: torch.Tensor  # of the preference losses: WPO's, or 1


@dataclass(frozen=True)
class PairLosses:
    """One value a pair; `metrics` holds the mean of each under the name that TRL gives it."""

    total: torch.Tensor
    metrics: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective(LossSettings):
    """A weighted sum of losses, loss -> weight, with their settings.

    The loss of a step is the mean over its pairs of `pair_losses`, plus the weighted router loss.
    """

    terms: dict[str, float]
    router_coefficient: float = 0.0

    @property
    def needs_whole_step(self) -> bool:
        """Whether a pair's gradient depends on the other pairs of its step, beyond their number and
        lengths.
        """
        return bool(self.router_coefficient) or any(LOSSES[name].whole_step for name in self.terms)

    @property
    def has_reference(self) -> bool:
        """Whether the rewards of its metrics are against the reference."""
        return not self._policy_only

    @property
    def prefers(self) -> bool:
        """Whether any of its losses compares chosen with rejected answers."""
        return any(LOSSES[name].prefers for name in self.terms)

    @property
    def is_logistic(self) -> bool:
        """Whether the loss is ln 2 where nothing is learned, and near 0 where margins are so large that the
        gradient is, too.
        """
        return (
            len(self.terms) == 1
            and all(LOSSES[name].is_logistic for name in self.terms)
            and not self.label_smoothing
        )

    @property
    def _policy_only(self) -> list[Loss]:
        """The losses that compare answers without the reference, where no loss takes the reference."""
        losses = [LOSSES[name] for name in self.terms]
        return [] if any(loss.has_reference for loss in losses) else [loss for loss in losses if loss.prefers]

    def pair_losses(self, pairs: PairLogps, mean_chosen_tokens: float) -> PairLosses:
        """Losses of pairs whose log-probs are at hand, without the router loss."""
        by_name = {name: self._losses_of(name, pairs, mean_chosen_tokens) for name in self.terms}
        total = torch.stack([weight * by_name[name] for name, weight in self.terms.items()]).sum(0)
        extra = {f"loss/{name}": value for name, value in by_name.items()} if len(by_name) > 1 else {}
        return PairLosses(total, {"loss": total, **self._metrics(pairs), **extra})

    def with_router_loss(self, losses: PairLosses, aux: torch.Tensor) -> PairLosses:
        """The losses plus the weighted router loss of the step, which is the same for each pair."""
        total = losses.total + self.router_coefficient * aux
        return PairLosses(total, {**losses.metrics, "loss": total, "aux_loss": aux.expand_as(total)})

    def _losses_of(self, name: str, pairs: PairLogps, mean_chosen_tokens: float) -> torch.Tensor:
        entry = LOSSES[name]
        inputs = {key: self._input(key, pairs, mean_chosen_tokens) for key in entry.inputs}
        settings = {key: getattr(self, key) for key in entry.settings}
        losses: torch.Tensor = loss_function(entry)(**inputs, **settings)
        return losses * pairs.weights if entry.has_reference else losses

    def _input(self, name: str, pairs: PairLogps, mean_chosen_tokens: float) -> torch.Tensor | float:
        """An input of loss functions, as `INPUTS` describes it."""
        match name:
            case "margins":
                chosen, rejected = self._scores(pairs)
                return chosen - rejected
            case "mean_margins":
                chosen, rejected = self._scores(pairs)
                return chosen / pairs.chosen_lengths - rejected / pairs.rejected_lengths
            case "chosen_logratios":
                return pairs.chosen - pairs.ref_chosen
            case "rejected_logratios":
                return pairs.rejected - pairs.ref_rejected
            case "policy_margins":
                return pairs.chosen - pairs.rejected
            case "reference_margins":
                return pairs.ref_chosen - pairs.ref_rejected
            case "chosen_logps":
                return pairs.chosen
            case "rejected_logps":
                return pairs.rejected
            case "chosen_sums" | "chosen_lengths" | "rejected_lengths":
                return getattr(pairs, name)  # type: ignore[no-any-return]
            case "mean_chosen_tokens":
                return mean_chosen_tokens
        raise AssertionError(name)

    def _scores(self, pairs: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the chosen and of the rejected completions: log-ratios after the f-divergence."""
        logratios = (
            (pairs.chosen, pairs.rejected)
            if self.reference_free
            else (pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected)
        )
        chosen, rejected = (
            reference_losses.divergence_scores(values, self.f_divergence, self.f_alpha)
            for values in logratios
        )
        return chosen, rejected

    def _metrics(self, pairs: PairLogps) -> dict[str, torch.Tensor]:
        """Rewards are against the reference, or the policy's own where no loss takes the reference, as in
        TRL's trainers of those losses.
        """
        if not self._policy_only:
            chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        elif self._policy_only[0].per_token:
            chosen, rejected = (
                pairs.chosen / pairs.chosen_lengths,
                pairs.rejected / pairs.rejected_lengths,
            )
        else:
            chosen, rejected = pairs.chosen, pairs.rejected
        chosen, rejected = self.beta * chosen.detach(), self.beta * rejected.detach()
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }


def loss_function(entry: Loss) -> Callable[..., torch.Tensor]:
    """The function of a loss, found by its name."""
    found = getattr(reference_losses, entry.function, None)
    return found or getattr(policy_losses, entry.function)  # type: ignore[no-any-return]
