"""Which losses a run trains on: their weighted sum, and what they are given of policy and reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpo_cache.losses import policy_losses
from dpo_cache.losses import reference_losses as losses
from dpo_cache.losses.table import MARGIN_LOSSES, POLICY_LOSSES, SFT_LOSSES, SORTED_LOSSES


@dataclass(frozen=True)
class PairLogps:
    """What the losses look at: log-probs of P pairs in nats, one value a pair."""

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
class Objective:
    """A weighted sum of losses with its settings, named as the options of `dpo-cache train`.

    The loss of a step is the mean over its pairs of what `losses` gives, plus the router loss.
    """

    terms: dict[str, float]
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    ld_reference: bool = True
    wpo: str = "off"
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    reference_free: bool = False
    router_coefficient: float = 0.0

    @property
    def needs_whole_step(self) -> bool:
        """Whether a pair's gradient depends on the other pairs of its step, beyond their number and
        lengths.
        """
        return bool(self.router_coefficient) or any(name in SORTED_LOSSES for name in self.terms)

    @property
    def has_reference(self) -> bool:
        """Whether the rewards of its metrics are against the reference."""
        return not (
            any(name in POLICY_LOSSES for name in self.terms)
            and set(self.terms) <= {*POLICY_LOSSES, *SFT_LOSSES}
        )

    @property
    def prefers(self) -> bool:
        """Whether any of its losses compares chosen with rejected answers."""
        return not set(self.terms) <= set(SFT_LOSSES)

    @property
    def is_logistic(self) -> bool:
        """Whether the loss is ln 2 where nothing is learned, and near 0 where margins are so large that the
        gradient is, too.
        """
        return (
            set(self.terms) <= {"sigmoid", "sigmoid_norm", *SORTED_LOSSES}
            and len(self.terms) == 1
            and not self.label_smoothing
        )

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
        if name in SFT_LOSSES:
            return policy_losses.sft_losses(
                pairs.chosen_sums, pairs.chosen_lengths if name == "sft_norm" else mean_chosen_tokens
            )
        if name in POLICY_LOSSES:
            return self._of_policy(name, pairs, mean_chosen_tokens)
        return (
            self._of_margin(name, pairs) if name in MARGIN_LOSSES else self._of_logratios(name, pairs)
        ) * pairs.weights

    def _of_margin(self, name: str, pairs: PairLogps) -> torch.Tensor:
        beta, smoothing = self.beta, self.label_smoothing
        chosen, rejected = (
            self._scores(pairs.chosen, pairs.ref_chosen),
            self._scores(pairs.rejected, pairs.ref_rejected),
        )
        if name in ("ipo_norm", "sigmoid_norm"):
            chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        margins = chosen - rejected
        match name:
            case "sigmoid":
                return losses.sigmoid_losses(margins, beta, smoothing)
            case "sigmoid_norm":
                return losses.sigmoid_losses(margins, beta)
            case "hinge":
                return losses.hinge_losses(margins, beta)
            case "ipo" | "ipo_norm":
                return losses.ipo_losses(margins, beta)
            case "exo_pair":
                return losses.exo_pair_losses(margins, beta, smoothing)
            case "robust":
                return losses.robust_losses(margins, beta, smoothing)
            case "discopop":
                return losses.discopop_losses(margins, beta, self.discopop_tau)
        raise AssertionError(name)

    def _of_logratios(self, name: str, pairs: PairLogps) -> torch.Tensor:
        beta = self.beta
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        match name:
            case "nca_pair":
                return losses.nca_pair_losses(chosen, rejected, beta)
            case "bco_pair":
                return losses.bco_pair_losses(chosen, rejected, beta)
            case "sppo_hard":
                return losses.sppo_hard_losses(chosen, rejected, beta)
            case "apo_zero":
                return losses.apo_zero_losses(chosen, rejected, beta)
            case "apo_down":
                return losses.apo_down_losses(chosen, rejected, beta)
            case "aot":
                return losses.aot_losses(
                    pairs.chosen - pairs.rejected,
                    pairs.ref_chosen - pairs.ref_rejected,
                    beta,
                    self.label_smoothing,
                )
            case "aot_unpaired":
                return losses.aot_losses(chosen, rejected, beta, self.label_smoothing)
        raise AssertionError(name)

    def _of_policy(self, name: str, pairs: PairLogps, mean_chosen_tokens: float) -> torch.Tensor:
        chosen, rejected, beta = pairs.chosen, pairs.rejected, self.beta
        lengths = (pairs.chosen_lengths, pairs.rejected_lengths)
        match name:
            case "simpo":
                return policy_losses.simpo_losses(
                    chosen, rejected, *lengths, beta, self.simpo_gamma, self.label_smoothing
                )
            case "orpo":
                return policy_losses.orpo_losses(chosen, rejected, *lengths, beta)
            case "cpo":
                preference = policy_losses.cpo_losses(chosen, rejected, beta, self.label_smoothing)
                return preference + self.cpo_alpha * policy_losses.sft_losses(
                    pairs.chosen_sums, mean_chosen_tokens
                )
            case "slic":
                return policy_losses.slic_losses(chosen, rejected, beta)
        raise AssertionError(name)

    def _scores(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return losses.divergence_scores(
            logps if self.reference_free else logps - reference, self.f_divergence, self.f_alpha
        )

    def _metrics(self, pairs: PairLogps) -> dict[str, torch.Tensor]:
        """Rewards are against the reference, or the policy's own where every loss leaves the reference out,
        as in TRL's trainers of those.
        """
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        if not self.has_reference:
            chosen, rejected = pairs.chosen, pairs.rejected
            alone = [name for name in self.terms if name in POLICY_LOSSES]
            if alone[0] in ("simpo", "orpo"):
                chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        chosen, rejected = self.beta * chosen.detach(), self.beta * rejected.detach()
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": pairs.chosen,
            "logps/rejected": pairs.rejected,
        }
