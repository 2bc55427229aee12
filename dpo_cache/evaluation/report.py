"""The report of `evaluate`, computed from the columns of scored pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from dpo_cache.evaluation.html import eval_html
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
from dpo_cache.evaluation.opening import EvaluatedModel
from dpo_cache.evaluation.scoring import PairColumns
from dpo_cache.losses.metrics import Metrics, PairMetrics
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.losses.ties import margin_rounding
from dpo_cache.progress import format_share
from dpo_cache.training.step_zero import TOLERANCES
from dpo_cache.types import UNKNOWN_DTYPE


@dataclass(frozen=True)
class Rewards:
    """Rewards of both answers of each pair, as training reports them, and the metrics of training as means
    over the pairs.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    roundings: np.ndarray  # the largest margin of each pair that rounding explains
    metrics: Metrics

    @property
    def margins(self) -> np.ndarray:
        return self.chosen - self.rejected


@dataclass(frozen=True)
class ReferenceGap:
    """The gap between the policy's log-probs of whole answers and the cached reference's, in nats."""

    is_reference: bool  # the same weights and config; unknown for an imported reference
    differing: tuple[str, ...]  # if it is another model, the fields in which their identities differ
    largest: float
    num_beyond: int  # completions whose gap rounding does not explain
    num_completions: int


@dataclass
class EvalReport:
    """The results of `evaluate`. Rewards and margins are those of training under the same loss and beta."""

    cache: str
    pairs: str
    reference: str
    model: str
    num_pairs: int
    pairs_in_set: int
    attention: str
    dtype: str
    device: str
    run: str | None  # the training run whose loss settings are used
    loss: list[str]
    beta: float
    loss_settings: dict[str, Any]  # all settings of the loss
    gap: ReferenceGap
    metrics: Metrics  # named as in training: loss, rewards/accuracies, rewards/margins, ...
    accuracy: Accuracy
    comparisons: dict[str, Accuracy]  # accuracy by other rewards
    margin: Spread
    chosen_reward: Spread
    rejected_reward: Spread
    logratio_per_token: dict[str, float]  # nats a token, over all chosen and over all rejected answers
    calibration: Calibration
    by_longer_answer: list[LengthGroup]
    by_answer_tokens: list[LengthGroup]  # by the tokens of both answers together
    by_prompt_tokens: list[LengthGroup]
    num_completions: int  # distinct completions that were scored
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
            f"{format_share(self.accuracy.share)}, loss {self.metrics['loss']:.4f}>"
        )

    def _repr_html_(self) -> str:
        return eval_html(self)


def find_rewards(pairs: PairLogps, objective: Objective, at_once: int | None = None) -> Rewards:
    """Rewards and metrics of training's own objective.

    Losses that compare pairs with each other are computed over `at_once` pairs at a time, by default over all
    of them.
    """
    means, sides, size = PairMetrics(), [], at_once or len(pairs.chosen)
    for start in range(0, len(pairs.chosen), size):
        group = PairLogps(
            **{entry.name: getattr(pairs, entry.name)[start : start + size] for entry in fields(PairLogps)}
        )
        losses = objective.pair_losses(group, float(group.chosen_lengths.mean()))
        means.add(losses)
        sides.append(torch.stack([losses["rewards/chosen"], losses["rewards/rejected"]]))
    chosen, rejected = torch.cat(sides, 1).numpy()
    return Rewards(chosen, rejected, objective.margin_rounding(pairs).numpy(), means.means())


def find_gap(columns: PairColumns, model: EvaluatedModel, reference_dtype: str | None) -> ReferenceGap:
    """Compare the policy's log-probs with the cached ones, with the tolerance of training's step zero."""
    policy = np.concatenate([columns.policy_chosen_logps, columns.policy_rejected_logps])
    reference = np.concatenate([columns.ref_chosen_logps, columns.ref_rejected_logps])
    absolute, relative = max(TOLERANCES[reference_dtype or UNKNOWN_DTYPE], TOLERANCES[model.dtype_name])
    gaps = np.abs(policy - reference)
    num_beyond = int((gaps > absolute + relative * np.abs(reference)).sum())
    return ReferenceGap(model.is_reference, model.differing, float(gaps.max()), num_beyond, len(gaps))


def describe_gap(gap: ReferenceGap, imported: str | None) -> str:
    """A remark on the policy's gap; `imported` is the name of an imported reference."""
    where = f"largest gap {gap.largest:.2g} nats over {gap.num_completions} answers"
    beyond = f"{where}, {gap.num_beyond} of them beyond rounding"
    if gap.is_reference and gap.num_beyond:
        return (
            f"the model is the reference, but its log-probs are not the cached ones: {beyond}.\n"
            "The cache is stale or was made on a faulty machine: score again into a new `cache`, and compare."
        )
    if gap.is_reference:
        return (
            f"the model is the reference ({where}): its rewards are zero up to rounding, so it has no "
            "accuracy, and its margins mean nothing."
        )
    if imported is None:
        return f"the model is another than the reference ({beyond}); they differ in {_shown(gap.differing)}."
    if not gap.num_beyond:
        return (
            f"the model repeats the log-probs of the imported reference {imported!r} ({where}): "
            "rewards that small mean nothing."
        )
    return (
        f"the model is not what the imported reference {imported!r} was made with ({beyond}), or its "
        "values come from other token ids."
    )


def _shown(differing: Sequence[str]) -> str:
    """One or two differing fields with their values, or the groups of more."""
    if len(differing) <= 2:
        return "; ".join(differing)
    groups = dict.fromkeys(entry.partition(":")[0].partition(".")[0] for entry in differing)
    return f"{len(differing)} fields of {', '.join(groups)}"


def compare_rewards(columns: PairColumns, token_rounding: float) -> dict[str, Accuracy]:
    """Accuracy of plain log-probs, summed and per token, of the policy and of the reference: the share in
    which they prefer the chosen answers without a reward.
    """
    sides = {
        "policy": (columns.policy_chosen_logps, columns.policy_rejected_logps),
        "reference": (columns.ref_chosen_logps, columns.ref_rejected_logps),
    }
    found, lengths = {}, (columns.chosen_tokens, columns.rejected_tokens)
    of_sums, of_means = (
        margin_rounding(token_rounding, *lengths, per_token=per_token) for per_token in (False, True)
    )
    for name, (chosen, rejected) in sides.items():
        found[f"{name} logps"] = measure_accuracy(chosen - rejected, of_sums)
        means = chosen / columns.chosen_tokens - rejected / columns.rejected_tokens
        found[f"{name} logps per token"] = measure_accuracy(means, of_means)
    return found


def measure_pairs(columns: PairColumns, rewards: Rewards, token_rounding: float) -> dict[str, Any]:
    """The fields of `EvalReport` that are measured over the pairs."""
    margins, roundings = rewards.margins, rewards.roundings
    return {
        "metrics": rewards.metrics,
        "accuracy": measure_accuracy(margins, roundings),
        "comparisons": compare_rewards(columns, token_rounding),
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
        "calibration": measure_calibration(margins, roundings),
        "by_longer_answer": by_longer_answer(
            columns.chosen_tokens, columns.rejected_tokens, margins, roundings
        ),
        "by_answer_tokens": by_quartile(columns.chosen_tokens + columns.rejected_tokens, margins, roundings),
        "by_prompt_tokens": by_quartile(columns.prompt_tokens, margins, roundings),
    }
