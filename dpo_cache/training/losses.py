"""Preference losses: pure functions of log-probs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dpo_cache.errors import ShapeError


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
    - conservative DPO, `label_smoothing > 0`: the expectation of that loss when a share `label_smoothing` of the
      labels is flipped (Eq. 3, https://ericmitchell.ai/cdpo.pdf);
    - IPO, `ipo=True`: `(h - 1 / (2 beta))^2`, where beta is the paper's tau (Eq. 17, arXiv:2310.12036); label
      smoothing is left aside.

    Same arguments, defaults and numbers as the function of this name in the original DPO repository.

    Args:
        policy_chosen_logps: log-probs of the chosen completions under the policy, summed over tokens, in nats.
            Shape (batch_size,), like the next three.
        policy_rejected_logps: the same of the rejected completions.
        reference_chosen_logps: the same of the chosen completions under the reference.
        reference_rejected_logps: the same of the rejected completions.
        beta: temperature, usually 0.1 to 0.5; the smaller, the further the policy may move from the reference.
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
        >>> losses, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, chosen, rejected, beta=0.1)
        >>> losses
        tensor([0.6931, 0.6931])
        >>> chosen_rewards
        tensor([0., 0.])

        Conservative: one label in ten may be wrong, so certainty is punished.

        >>> losses, _, _ = preference_loss(chosen + 30, rejected, chosen, rejected, beta=0.1, label_smoothing=0.1)
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
    if ipo:
        losses = (margins - 1 / (2 * beta)) ** 2
    else:
        kept, flipped = -F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
        losses = kept * (1 - label_smoothing) - flipped * label_smoothing
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def _check_shapes(**values: Any) -> None:
    """Plain numbers and tensors without dimensions mean the same for every pair; all else must have one shape."""
    shapes = {name: tuple(value.shape) for name, value in values.items() if getattr(value, "shape", ())}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ShapeError(f"preference_loss needs one shape (batch_size,), found {found}.")
