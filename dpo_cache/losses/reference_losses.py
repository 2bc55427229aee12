"""Losses against a reference: pure functions of log-probs in nats, one value a pair, not averaged.

Three quantities recur, each of shape (batch_size,):

    logratios   log policy(y|x) - log reference(y|x) of a completion, summed over its tokens
    scores      logratios after the f-divergence, see `divergence_scores`; without one the two are the same
    margins     score of the chosen completion minus score of the rejected one

beta is above 0: the smaller, the further the policy may move from the reference. `table.py` lists the losses
with their papers; losses without a reference are in `policy_losses.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from dpo_cache.errors import ShapeError

LARGEST_EXPONENT = 80.0  # e^80 is finite in float32; a score that large has left every sensible range


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and implicit rewards of a batch of pairs: `(losses, chosen_rewards, rejected_rewards)`.

    With `h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)`:

    - DPO, the default: `-log sigmoid(beta h)` (Eq. 7, arXiv:2305.18290);
    - conservative DPO, `label_smoothing > 0`: the expectation of that loss when a share `label_smoothing` of
      the labels is flipped (Eq. 3, https://ericmitchell.ai/cdpo.pdf);
    - IPO, `ipo=True`: `(h - 1 / (2 beta))^2`, where beta is the paper's tau (Eq. 17, arXiv:2310.12036); label
      smoothing is ignored.

    Same arguments, defaults and numbers as the function of this name in the original DPO repository.

    Args:
        policy_chosen_logps: log-probs of the chosen completions under the policy, summed over tokens, in
            nats. Shape (batch_size,), like the next three.
        policy_rejected_logps: the same of the rejected completions.
        reference_chosen_logps: the same of the chosen completions under the reference.
        reference_rejected_logps: the same of the rejected completions.
        beta: temperature, usually 0.1 to 0.5; the smaller, the further the policy may move from the
            reference.
        label_smoothing: share of flipped labels that is assumed, 0 to 0.5.
        ipo: take the IPO loss.
        reference_free: take a uniform reference in the losses; the rewards still subtract the values given.

    Returns:
        losses: one loss a pair, shape (batch_size,), with gradients; not averaged.
        chosen_rewards, rejected_rewards: `beta * (policy - reference)`, shape (batch_size,), detached.

    Raises:
        ShapeError: tensors whose shapes differ, which broadcasting would turn into wrong losses.

    Examples:
        Standard: a policy that equals the reference has margin 0, so every loss is ln 2.

        >>> import torch
        >>> chosen, rejected = torch.tensor([-8.0, -20.0]), torch.tensor([-10.0, -19.0])
        >>> losses, chosen_rewards, _ = preference_loss(chosen, rejected, chosen, rejected, beta=0.1)
        >>> losses
        tensor([0.6931, 0.6931])
        >>> chosen_rewards
        tensor([0., 0.])

        Conservative: one label in ten may be wrong, so certainty is punished.

        >>> losses, _, _ = preference_loss(
        ...     chosen + 30, rejected, chosen, rejected, beta=0.1, label_smoothing=0.1
        ... )
        >>> losses
        tensor([0.3486, 0.3486])

        IPO: the loss is 0 where the margin is exactly 1 / (2 beta).

        >>> losses, _, _ = preference_loss(chosen + 5, rejected, chosen, rejected, beta=0.1, ipo=True)
        >>> losses
        tensor([0., 0.])
    """
    _check_shapes(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    policy_logratios = policy_chosen_logps - policy_rejected_logps
    reference_logratios = 0 if reference_free else reference_chosen_logps - reference_rejected_logps
    margins = policy_logratios - reference_logratios
    losses = ipo_losses(margins, beta) if ipo else sigmoid_losses(margins, beta, label_smoothing)
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


# -- of the margin ---------------------------------------------------------------------------------------


def sigmoid_losses(margins: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO: `-log sigmoid(beta m)` (Eq. 7, arXiv:2305.18290).

    With label smoothing: conservative DPO (Eq. 3, https://ericmitchell.ai/cdpo.pdf).
    """
    kept, flipped = -F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return kept * (1 - label_smoothing) - flipped * label_smoothing


def sigmoid_norm_losses(mean_margins: torch.Tensor, beta: float) -> torch.Tensor:
    """Length-normalized DPO of Tülu 3: `-log sigmoid(beta m)` of per-token averages (Eq. 6,
    arXiv:2411.15124).
    """
    return sigmoid_losses(mean_margins, beta)


def hinge_losses(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """`max(0, 1 - beta m)`: SLiC's hinge on log-ratios, as in RSO (arXiv:2309.06657, `hinge-norm`)."""
    return torch.relu(1 - beta * margins)


def ipo_losses(margins: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO: `(m - 1 / (2 beta))^2`, where beta is the paper's tau (Eq. 17, arXiv:2310.12036); here of
    summed margins, as in the original DPO repository.
    """
    return (margins - 1 / (2 * beta)) ** 2


def ipo_norm_losses(mean_margins: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO of per-token averages, as in TRL and LLaMA-Factory."""
    return ipo_losses(mean_margins, beta)


def exo_pair_losses(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """EXO of a pair: KL divergence from `(sigmoid(beta m), sigmoid(-beta m))` to `(1 - e, e)` (Eq. 16,
    arXiv:2402.00856).

    e is the label smoothing, above 0; the paper takes 0.001.
    """
    logits = beta * margins
    kept = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    flipped = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return kept + flipped


def robust_losses(margins: torch.Tensor, beta: float, label_smoothing: float) -> torch.Tensor:
    """Robust DPO: an unbiased estimate of the DPO loss when a share e < 0.5 of the labels is flipped
    (arXiv:2403.00409).

    `(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e)`; conservative DPO adds where this
    subtracts.
    """
    kept, flipped = -F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def discopop_losses(margins: torch.Tensor, beta: float, discopop_tau: float = 0.05) -> torch.Tensor:
    """DiscoPOP: logistic and exponential loss of `z = beta m`, mixed by `sigmoid(z / tau)` (Eq. 5,
    arXiv:2406.08414), where tau is `discopop_tau`.

    `-log sigmoid(z) (1 - sigmoid(z / tau)) + exp(-z) sigmoid(z / tau)`, with the last product taken in the
    exponent: written out it is infinity times zero where the margin is far below 0.
    """
    logits = beta * margins
    logistic = -F.logsigmoid(logits) * (-logits / discopop_tau).sigmoid()
    return logistic + (F.logsigmoid(logits / discopop_tau) - logits).exp()


# -- of the two log-ratios -------------------------------------------------------------------------------


def nca_pair_losses(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float
) -> torch.Tensor:
    """NCA of a pair, with `c` and `r` beta times the log-ratios (Sec. 4, arXiv:2402.05369).

    `-log sigmoid(c) - 0.5 log sigmoid(-c) - 0.5 log sigmoid(-r)`: absolute likelihoods, not only their
    difference.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_losses(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float
) -> torch.Tensor:
    """BCO of a pair, a binary classifier of good and bad: `-log sigmoid(c) - log sigmoid(-r)`
    (arXiv:2404.04656).

    Without the paper's reward shift, as in TRL 1.16.
    """
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-beta * rejected_logratios)


def sppo_hard_losses(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float
) -> torch.Tensor:
    """SPPO with win rates of 1 and 0: `(lc - 1/(2 beta))^2 + (lr + 1/(2 beta))^2` of the log-ratios (Eq. 4.7,
    arXiv:2405.00675).
    """
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def apo_zero_losses(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float
) -> torch.Tensor:
    """APO-zero: chosen up, rejected down: `1 - sigmoid(c) + sigmoid(r)` (Eq. 7, arXiv:2408.06266).

    For data whose chosen answers are better than the policy's own.
    """
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down_losses(
    chosen_logratios: torch.Tensor, rejected_logratios: torch.Tensor, beta: float
) -> torch.Tensor:
    """APO-down: both down, rejected more: `sigmoid(c) + 1 - sigmoid(c - r)` (Eq. 8, arXiv:2408.06266).

    For data whose chosen answers are worse than the policy's own.
    """
    return (beta * chosen_logratios).sigmoid() + (beta * (rejected_logratios - chosen_logratios)).sigmoid()


def aot_losses(
    policy_margins: torch.Tensor, reference_margins: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """AOT, paired: the DPO loss of the policy's sorted margins minus the reference's sorted margins, one
    value a rank (Sec. 3, arXiv:2406.05882).

    Only the mean over the batch has a meaning, and it depends on which pairs are in the batch.
    """
    return sigmoid_losses(
        policy_margins.sort().values - reference_margins.sort().values, beta, label_smoothing
    )


def aot_unpaired_losses(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """AOT, unpaired: `aot_losses` of the chosen and the rejected log-ratios."""
    return aot_losses(chosen_logratios, rejected_logratios, beta, label_smoothing)


# -- inputs and weights ----------------------------------------------------------------------------------


def divergence_scores(
    logratios: torch.Tensor, divergence: str = "reverse_kl", alpha: float = 0.5
) -> torch.Tensor:
    """`f'(t)` of `t = exp(logratio)` for the f-divergence that holds the policy to the reference
    (arXiv:2309.16240).

    - reverse_kl: `log t`, which is DPO
    - forward_kl: `1 - 1/t`
    - js_divergence: `log(2 t / (1 + t))`
    - alpha_divergence: `(t^(alpha - 1) - 1) / (alpha - 1)`; for alpha = 1 it is reverse_kl

    Constants that cancel in a margin are those of TRL. Exponents are cut at 80, beyond which the score is
    infinite in float32: there a pair has no gradient.
    """
    if divergence == "forward_kl":
        return 1 - (-logratios).clamp(max=LARGEST_EXPONENT).exp()
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return (((alpha - 1) * logratios).clamp(max=LARGEST_EXPONENT).exp() - 1) / (alpha - 1)
    return logratios


def wpo_weights(chosen_means: torch.Tensor, rejected_means: torch.Tensor, *, clipped: bool) -> torch.Tensor:
    """WPO's weight of each pair: how likely the policy is to write its answers (Eq. 2, arXiv:2406.11827).

    `exp(chosen) exp(rejected)` of the means over tokens of `log p(token) - log sum_v p(v)^2`, detached. With
    `clipped` it is at most 1.
    """
    weights = (chosen_means + rejected_means).detach().exp()
    return weights.clamp(max=1.0) if clipped else weights


def _check_shapes(**values: Any) -> None:
    """Raise `ShapeError` unless all have one shape; a number, or a tensor without dimensions, fits any."""
    shapes = {name: tuple(value.shape) for name, value in values.items() if getattr(value, "shape", ())}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"preference_loss needs one shape (batch_size,), found {found}.")
