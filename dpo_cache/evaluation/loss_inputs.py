"""From the policy's scores of a window of pairs to the inputs of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.runner import Runner
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.losses.reference_losses import wpo_weights
from dpo_cache.store import completion_key
from dpo_cache.training.batches import completions_of, split_step
from dpo_cache.training.pair_logps import reference_logps, summed_logps
from dpo_cache.types import Score, ScoredPair


def loss_inputs(
    objective: Objective, window: Sequence[ScoredPair], scores: Mapping[bytes, Score], runner: Runner
) -> PairLogps:
    """What `pair_logps` of training returns, as float64 on the CPU, from the score of each completion by its
    key.
    """
    completions = completions_of(window)
    policy = [scores[completion_key(completion)] for completion in completions]
    sums, weighted = summed_logps(policy), summed_logps(policy, objective.ld_alpha)
    reference = reference_logps(window, objective.ld_alpha if objective.ld_reference else None)
    lengths = np.array([completion.num_tokens for completion in completions], np.float64)
    chosen, rejected = torch.from_numpy(weighted).chunk(2)
    ref_chosen, ref_rejected = torch.from_numpy(reference).chunk(2)
    chosen_lengths, rejected_lengths = torch.from_numpy(lengths).chunk(2)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_sums=torch.from_numpy(sums).chunk(2)[0],
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=_weights(objective, window, runner),
    )


@torch.no_grad()
def _weights(objective: Objective, window: Sequence[ScoredPair], runner: Runner) -> torch.Tensor:
    """Weights of the pairs under WPO: another forward pass, for it needs whole distributions."""
    if objective.wpo == "off":
        return torch.ones(len(window), dtype=torch.float64)
    policy = PolicyModel(runner.model, runner.attention, with_squares=True)
    found: dict[int, torch.Tensor] = {}  # by the identity of the pair
    while left := [scored for scored in window if id(scored) not in found]:
        try:
            for group in split_step(left, runner.budget.tokens, policy.count_tokens):
                (logps,) = policy([completions_of(group.pairs)])
                means = logps.excess_means().to("cpu", torch.float64).chunk(2)
                weights = wpo_weights(*means, clipped=objective.wpo == "clipped")
                found.update(
                    (id(scored), weight) for scored, weight in zip(group.pairs, weights, strict=True)
                )
        except RuntimeError as error:
            if not is_out_of_memory(error, runner.model.device):
                raise
            runner.budget.halve(error)
    return torch.stack([found[id(scored)] for scored in window])
