"""From the log-probs of completions under policy and reference to the losses of their pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch

from dpo_cache.lm.device import to_device
from dpo_cache.lm.policy import CompletionLogps
from dpo_cache.lm.routing import add_routings
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.losses.policy_losses import router_loss
from dpo_cache.losses.reference_losses import wpo_weights
from dpo_cache.losses.table import LossSettings
from dpo_cache.losses.terms import loss_terms
from dpo_cache.options.losses import LossOptions
from dpo_cache.types import Score, ScoredPair

# Pairs, and the policy's log-probs of all chosen, then all rejected completions.
RunPairs = tuple[Sequence[ScoredPair], CompletionLogps]


def objective_of(options: LossOptions, router_coefficient: float = 0.0) -> Objective:
    """The objective with the loss settings of the options."""
    settings = {entry.name: getattr(options, entry.name) for entry in fields(LossSettings)}
    return Objective(terms=loss_terms(options.loss), router_coefficient=router_coefficient, **settings)


def evaluated_at_once(objective: Objective, batch_size: int) -> int:
    """How many pairs training evaluates at a time: as many as in a step, if a loss depends on all of them."""
    return batch_size if objective.needs_whole_step else 64


def policy_losses(
    objective: Objective, parts: Sequence[RunPairs], mean_chosen_tokens: float
) -> dict[str, torch.Tensor]:
    """The `loss` of each pair of the parts, with gradients by the policy's token log-probs, and its metrics.

    `mean_chosen_tokens` is the mean length of the step's chosen completions: `sft` is a mean over tokens.
    """
    pairs = join_pairs([pair_logps(objective, scored, policy) for scored, policy in parts])
    losses = objective.pair_losses(pairs, mean_chosen_tokens)
    if not objective.router_coefficient:
        return losses
    routing = add_routings([policy.routing for _, policy in parts if policy.routing])
    aux = router_loss(routing.choices_E, routing.probs_E, routing.num_rows)
    return objective.with_router_loss(losses, aux)


def pair_logps(objective: Objective, scored: Sequence[ScoredPair], policy: CompletionLogps) -> PairLogps:
    """The inputs of the losses for these pairs, in the dtype and on the device of the policy's sums."""
    sums = weighted = policy.sums()
    ld_alpha = objective.ld_alpha
    if ld_alpha is not None:
        weighted = policy.sums(_to(np.concatenate(token_weights(policy.lengths, ld_alpha)), sums))
    chosen, rejected = weighted.chunk(2)
    reference = reference_logps(scored, ld_alpha if objective.ld_reference else None)
    ref_chosen, ref_rejected = _to(reference, sums).chunk(2)
    chosen_lengths, rejected_lengths = _to(np.array(policy.lengths), sums).chunk(2)
    weights = torch.ones_like(ref_chosen)
    if objective.wpo != "off":
        weights = wpo_weights(*policy.excess_means().chunk(2), clipped=objective.wpo == "clipped")
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_sums=sums.chunk(2)[0],
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
    )


def reference_logps(scored: Sequence[ScoredPair], ld_alpha: float | None = None) -> np.ndarray:
    """The reference's log-probs of the chosen, then of the rejected completions: float64 [2P], weighted by
    `token_weights` under LD-DPO.
    """
    return summed_logps(
        [pair.ref_chosen for pair in scored] + [pair.ref_rejected for pair in scored], ld_alpha
    )


def summed_logps(scores: Sequence[Score], ld_alpha: float | None = None) -> np.ndarray:
    """Log-probs of P chosen, then P rejected completions, summed over tokens: float64 [2P], weighted by
    `token_weights` under LD-DPO.
    """
    if ld_alpha is None:
        return np.array([score.logps for score in scores])
    weights = token_weights([len(score.token_logps) for score in scores], ld_alpha)
    return np.array(
        [(score.token_logps * weight).sum() for score, weight in zip(scores, weights, strict=True)]
    )


def mean_chosen_tokens(scored: Sequence[ScoredPair]) -> float:
    """Mean length of the chosen completions."""
    return sum(pair.pair.chosen.num_tokens for pair in scored) / len(scored)


def token_weights(lengths: Sequence[int], ld_alpha: float) -> list[np.ndarray]:
    """The weight of each token under LD-DPO (arXiv:2409.06411): `ld_alpha` past the length of the pair's
    shorter completion, otherwise 1.

    `lengths` are those of P chosen, then P rejected completions; the result is one float64 array for each.
    """
    num_pairs = len(lengths) // 2
    shared = [min(pair) for pair in zip(lengths[:num_pairs], lengths[num_pairs:], strict=True)] * 2
    return [
        np.where(np.arange(length) < common, 1.0, ld_alpha)
        for length, common in zip(lengths, shared, strict=True)
    ]


def join_pairs(parts: Sequence[PairLogps]) -> PairLogps:
    """The pairs of all parts, in their order."""
    names = [entry.name for entry in fields(PairLogps)]
    return PairLogps(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _to(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.from_numpy(values).to(like.dtype), like.device)
