"""What `evaluate` tells, made from the columns of scored pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dpo_cache.evaluation.measures import (
    Accuracy,
    Calibration,
    LengthGroup,
    Spread,
    by_longer_answer,
    by_quartile,
    logratio_per_token,
    measure_accuracy,
    measure_calibration,
    measure_spread,
)
from dpo_cache.evaluation.scoring import PairColumns
from dpo_cache.losses.metrics import Metrics, PairMetrics
from dpo_cache.losses.objective import PairLogps
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.training.pair_logps import objective_of
from dpo_cache.training.step_zero import TOLERANCES, UNKNOWN_DTYPE


@dataclass(frozen=True)
class Rewards:
    """Rewards of each pair's two answers, as training reports them, and the metrics of training as means over
    the pairs.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    metrics: Metrics

    @property
    def margins(self) -> np.ndarray:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class ReferenceGap:
    """How far the policy's log-probs of whole answers are from the cached ones of the reference, in nats."""

    is_reference: bool  # the same weights and config; never known of an imported reference
    differing: tuple[str, ...]  # fields of their identities, where it is another model
    largest: float
    num_beyond: int  # completions whose gap rounding does not explain
    num_completions: int


@dataclass
class EvalReport:
    """What `evaluate` found. Rewards and margins are those that training reports under the same loss and
    beta.
    """

    cache: str
    pairs: str
    reference: str
    model: str
    num_pairs: int
    pairs_in_set: int
    attention: str
    dtype: str
    device: str
    loss: list[str]
    beta: float
    gap: ReferenceGap
    metrics: Metrics  # named as in training: loss, rewards/accuracies, rewards/margins, ...
    accuracy: Accuracy
    comparisons: dict[str, Accuracy]  # what the pairs would be called by other rewards
    margin: Spread
    chosen_reward: Spread
    rejected_reward: Spread
    logratio_per_token: dict[str, float]  # of all chosen, all rejected answers, in nats
    calibration: Calibration
    by_longer_answer: list[LengthGroup]
    by_answer_tokens: list[LengthGroup]  # of both answers together
    by_prompt_tokens: list[LengthGroup]
    num_completions: int  # scored: distinct ones
    data_tokens: int
    model_tokens: int
    scoring_s: float
    elapsed_s: float
    pairs_per_s: float
    peak_bytes: int
    output: str | None
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<EvalReport of {self.model} on {self.pairs}: {self.num_pairs:,} pairs, accuracy "
            f"{self.accuracy.share:.1%}, loss {self.metrics['loss']:.4f}>"
        )


def find_rewards(columns: PairColumns, options: EvalOptions) -> Rewards:
    """Rewards and metrics of training's own objective, all pairs taken as one batch."""
    losses = objective_of(options).pair_losses(_pair_logps(columns), float(columns.chosen_tokens.mean()))
    means = PairMetrics()
    means.add(losses.metrics)
    chosen, rejected = (losses.metrics[f"rewards/{side}"].numpy() for side in ("chosen", "rejected"))
    return Rewards(chosen, rejected, means.means())


def find_gap(
    columns: PairColumns,
    is_reference: bool,
    differing: tuple[str, ...],
    *,
    policy_dtype: str,
    reference_dtype: str | None,
) -> ReferenceGap:
    """Policy beside cache, with the tolerance that step zero of a training has."""
    policy = np.concatenate([columns.policy_chosen_logps, columns.policy_rejected_logps])
    reference = np.concatenate([columns.ref_chosen_logps, columns.ref_rejected_logps])
    absolute, relative = max(TOLERANCES[reference_dtype or UNKNOWN_DTYPE], TOLERANCES[policy_dtype])
    gaps = np.abs(policy - reference)
    num_beyond = int((gaps > absolute + relative * np.abs(reference)).sum())
    return ReferenceGap(is_reference, differing, float(gaps.max()), num_beyond, len(gaps))


def describe_gap(gap: ReferenceGap, imported: str | None) -> str:
    """What the gap says of the policy, in one remark; `imported` is the name of an imported reference."""
    where = f"largest gap {gap.largest:.2g} nats over {gap.num_completions} answers"
    beyond = f"{where}, {gap.num_beyond} of them beyond rounding"
    if gap.is_reference and gap.num_beyond:
        return (
            f"the model is the reference, but its log-probs are not the cached ones: {beyond}.\n"
            "The cache is stale or was made on a faulty machine: score again into a new --cache, and compare."
        )
    if gap.is_reference:
        return (
            f"the model is the reference ({where}): its rewards are zero up to rounding, so its "
            "accuracy, margins and calibration say nothing."
        )
    if imported is None:
        return (
            f"the model is another than the reference ({beyond}); they differ in {'; '.join(gap.differing)}."
        )
    if not gap.num_beyond:
        return (
            f"the model repeats the log-probs of the imported reference {imported!r} ({where}): "
            "rewards that small say nothing."
        )
    return (
        f"the model is not what the imported reference {imported!r} was made with ({beyond}), or its "
        "values come from other token ids."
    )


def compare_rewards(columns: PairColumns) -> dict[str, Accuracy]:
    """Accuracy of plain log-probs, summed and per token, of the policy and of the reference: what preferences
    need no training for.
    """
    sides = {
        "policy": (columns.policy_chosen_logps, columns.policy_rejected_logps),
        "reference": (columns.ref_chosen_logps, columns.ref_rejected_logps),
    }
    found = {}
    for name, (chosen, rejected) in sides.items():
        found[f"{name} logps"] = measure_accuracy(chosen - rejected)
        found[f"{name} logps per token"] = measure_accuracy(
            chosen / columns.chosen_tokens - rejected / columns.rejected_tokens
        )
    return found


def measure_pairs(columns: PairColumns, rewards: Rewards) -> dict[str, Any]:
    """The fields of `EvalReport` that are measured of the pairs."""
    margins = rewards.margins
    return {
        "metrics": rewards.metrics,
        "accuracy": measure_accuracy(margins),
        "comparisons": compare_rewards(columns),
        "margin": measure_spread(margins),
        "chosen_reward": measure_spread(rewards.chosen),
        "rejected_reward": measure_spread(rewards.rejected),
        "logratio_per_token": {
            "chosen": logratio_per_token(
                columns.policy_chosen_logps, columns.ref_chosen_logps, columns.chosen_tokens
            ),
            "rejected": logratio_per_token(
                columns.policy_rejected_logps, columns.ref_rejected_logps, columns.rejected_tokens
            ),
        },
        "calibration": measure_calibration(margins),
        "by_longer_answer": by_longer_answer(columns.chosen_tokens, columns.rejected_tokens, margins),
        "by_answer_tokens": by_quartile(columns.chosen_tokens + columns.rejected_tokens, margins),
        "by_prompt_tokens": by_quartile(columns.prompt_tokens, margins),
    }


def _pair_logps(columns: PairColumns) -> PairLogps:
    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float64))

    chosen = tensor(columns.policy_chosen_logps)
    return PairLogps(
        chosen=chosen,
        rejected=tensor(columns.policy_rejected_logps),
        ref_chosen=tensor(columns.ref_chosen_logps),
        ref_rejected=tensor(columns.ref_rejected_logps),
        chosen_sums=chosen,
        chosen_lengths=tensor(columns.chosen_tokens),
        rejected_lengths=tensor(columns.rejected_tokens),
        weights=torch.ones_like(chosen),
    )
