"""Computes the losses of pairs from the log-probs of their completions under policy and reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from dpo_cache.lm.device import to_device
from dpo_cache.lm.policy import CompletionLogps
from dpo_cache.lm.routing import Routing, add_routings
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.losses.policy_losses import router_loss
from dpo_cache.losses.reference_losses import wpo_weights
from dpo_cache.losses.table import LossSettings
from dpo_cache.losses.terms import loss_terms
from dpo_cache.options.losses import LossOptions
from dpo_cache.types import Score, ScoredPair

# Pairs, and the policy's log-probs of all chosen, then all rejected completions.
RunPairs = tuple[Sequence[ScoredPair], CompletionLogps]


def objective_of(
    options: LossOptions, router_coefficient: float = 0.0, token_rounding: float = 0.0
) -> Objective:
    """The objective with the loss settings of the options."""
    settings = {entry.name: getattr(options, entry.name) for entry in fields(LossSettings)}
    return Objective(
        terms=loss_terms(options.loss),
        router_coefficient=router_coefficient,
        token_rounding=token_rounding,
        **settings,
    )


def evaluated_at_once(objective: Objective, batch_size: int, num_ranks: int = 1) -> int:
    """The number of pairs that training evaluates at a time: that of a step, if a loss depends on all pairs.

    Several ranks evaluate more at a time, unless a loss depends on the mean length of the pairs.
    """
    if objective.needs_whole_step:
        return batch_size
    return 64 if any("mean_chosen_tokens" in loss.inputs for loss in objective.losses) else 64 * num_ranks


def policy_losses(
    objective: Objective, parts: Sequence[RunPairs], mean_chosen_tokens: float
) -> dict[str, torch.Tensor]:
    """The `loss` of each pair of the parts, with gradients by the policy's token log-probs, and its metrics.

    `mean_chosen_tokens` is the mean length of the step's chosen completions: `sft` is a mean over tokens.
    """
    return _losses_of(objective, *_inputs_of(objective, parts), mean_chosen_tokens)


def policy_losses_of_all(
    objective: Objective,
    parts: Sequence[RunPairs],
    mean_chosen_tokens: float,
    exchange: Callable[[Any], list[Any]],
    rank: int,
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], slice]:
    """`policy_losses` of the parts of all ranks together, with gradients by the log-probs of this rank; and
    the place of this rank's pairs among them. The sum of all ranks' gradients is that of the losses on one
    rank.

    `exchange` returns the values of all ranks. A rank may have no parts.
    """
    inputs = _inputs_of(objective, parts) if parts else None
    values: list[tuple[PairLogps, Routing | None] | None] = exchange(inputs and _moved(*inputs, "cpu"))
    sizes = [0 if value is None else len(value[0].chosen) for value in values]
    here = [value and _moved(*value, device) for value in values]
    here[rank] = inputs
    known = [value for value in here if value is not None]
    routings = [routing for _, routing in known if routing is not None]
    pairs, routing = join_pairs([one for one, _ in known]), add_routings(routings) if routings else None
    start = sum(sizes[:rank])
    losses = _losses_of(objective, pairs, routing, mean_chosen_tokens)
    return losses, slice(start, start + sizes[rank])


def _inputs_of(objective: Objective, parts: Sequence[RunPairs]) -> tuple[PairLogps, Routing | None]:
    """The log-probs of the pairs of all parts and, for a mixture of experts, its routing."""
    pairs = join_pairs([pair_logps(objective, scored, policy) for scored, policy in parts])
    routings = [policy.routing for _, policy in parts if policy.routing]
    return pairs, add_routings(routings) if routings else None


def _losses_of(
    objective: Objective, pairs: PairLogps, routing: Routing | None, mean_chosen_tokens: float
) -> dict[str, torch.Tensor]:
    losses = objective.pair_losses(pairs, mean_chosen_tokens)
    if not objective.router_coefficient:
        return losses
    assert routing is not None
    return objective.with_router_loss(
        losses, router_loss(routing.choices_E, routing.probs_E, routing.num_rows)
    )


def _moved(
    pairs: PairLogps, routing: Routing | None, device: torch.device | str
) -> tuple[PairLogps, Routing | None]:
    """The values on a device, without gradients."""
    moved = {
        entry.name: getattr(pairs, entry.name).detach().to(device, copy=True) for entry in fields(PairLogps)
    }
    return PairLogps(**moved), routing and Routing(*(value.detach().to(device) for value in routing))


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
