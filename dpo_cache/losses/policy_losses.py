"""Losses without a reference: pure functions of log-probs in nats, one value a pair, not averaged.

`logps` are sums over a completion's tokens, `lengths` the number of those tokens; both of shape
(batch_size,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dpo_cache.losses.reference_losses import hinge_losses, sigmoid_losses

MOST_CERTAIN = -1e-7  # nats a token; nearer to 0 the odds of a completion are infinite


def sft_losses(chosen_sums: torch.Tensor, mean_chosen_tokens: torch.Tensor | float) -> torch.Tensor:
    """Negative log-likelihood of the chosen completion, divided by the mean length in the step.

    So the mean over the step's pairs is the mean over their tokens, as in TRL.
    """
    return -chosen_sums / mean_chosen_tokens


def sft_norm_losses(chosen_sums: torch.Tensor, chosen_lengths: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the chosen completion, divided by its length, as LLaMA-Factory's `pref_ftx`
    and the NLL term of RPO (Eq. 1, arXiv:2404.19733).
    """
    return -chosen_sums / chosen_lengths


def simpo_losses(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """SimPO: `-log sigmoid(beta (chosen / length - rejected / length) - gamma)` (Eq. 6, arXiv:2405.14734).

    beta is usually 2 to 10; gamma, the target margin, is `simpo_gamma`, 0.3 to 1.6.
    """
    margins = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return sigmoid_losses(margins - simpo_gamma / beta, beta, label_smoothing)


def cpo_losses(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_sums: torch.Tensor,
    mean_chosen_tokens: torch.Tensor | float,
    beta: float,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
) -> torch.Tensor:
    """CPO: `-log sigmoid(beta (chosen - rejected))` plus `cpo_alpha` times `sft_losses` (Eq. 3,
    arXiv:2401.08417).
    """
    preference = sigmoid_losses(chosen_logps - rejected_logps, beta, label_smoothing)
    return preference + cpo_alpha * sft_losses(chosen_sums, mean_chosen_tokens)


def slic_losses(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """SLiC-HF's rank calibration: `max(0, 1 - beta (chosen - rejected))` (arXiv:2305.10425), where 1 / beta
    is the paper's delta.
    """
    return hinge_losses(chosen_logps - rejected_logps, beta)


def orpo_losses(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """ORPO: `-c - beta log sigmoid(log odds(c) - log odds(r))` of the per-token means c and r (Eqs. 4, 6 and
    7, arXiv:2403.07691).

    `log odds(x) = x - log(1 - exp(x))`; beta is the paper's lambda.
    """
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def router_loss(choices_E: torch.Tensor, probs_E: torch.Tensor, num_rows: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of a mixture of experts: `E sum_e f_e P_e` (Eqs. 4 to 6, arXiv:2101.03961); K if
    the load is even.

    `choices_E` counts how often each of E experts was among the K chosen, `probs_E` adds up its router
    probabilities, both over `num_rows` tokens times layers; f_e and P_e are their means. Equals transformers'
    `load_balancing_loss_func` on a padded batch with one row a completion.
    """
    shares_E, means_E = choices_E / num_rows, probs_E / num_rows
    return len(means_E) * (shares_E * means_E).sum()


def _log_odds(means: torch.Tensor) -> torch.Tensor:
    below_zero = means.clamp(max=MOST_CERTAIN)
    return means - (-below_zero.expm1()).log()
