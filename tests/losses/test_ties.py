"""Which margins are rounding noise, and the accuracy of many pairs."""

import numpy as np
import pytest
import torch

from dpo_cache.losses.metrics import PairMetrics
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.losses.ties import accuracy_of, margin_rounding

LENGTHS = np.array([9.0, 50.0]), np.array([16.0, 50.0])


def test_rounding_adds_up_over_the_tokens_of_both_answers() -> None:
    # 2 * 0.01 * sqrt(9 + 16), and sqrt(50 + 50)
    assert margin_rounding(0.01, *LENGTHS) == pytest.approx([0.1, 0.2])
    # of means over the tokens: 2 * 0.01 * sqrt(1/9 + 1/16), and sqrt(1/50 + 1/50)
    expected = [0.02 * 5 / 12, 0.02 * 0.2]
    assert margin_rounding(0.01, *LENGTHS, per_token=True) == pytest.approx(expected)


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_margins_by_independent_rounding_have_no_accuracy(num_tokens: int) -> None:
    """Gaps of tokens with a mean size of `token_rounding`, which is an upper limit in a real model."""
    generator = np.random.default_rng(num_tokens)
    scale = 0.05 * (np.pi / 2) ** 0.5  # of a normal distribution with a mean size of 0.05
    for _ in range(20):
        gaps = generator.normal(0, scale, (500, 2 * num_tokens)).sum(1)
        limit = margin_rounding(0.05, num_tokens, num_tokens)
        assert (np.abs(gaps) <= limit).mean() > 0.8
        halved = gaps / 2  # as measured of SmolLM2-135M in bfloat16
        assert accuracy_of((halved > limit).sum(), (np.abs(halved) <= limit).sum(), 500) is None


def test_ties_count_half_and_nearly_all_of_them_leave_no_accuracy() -> None:
    assert accuracy_of(2, 2, 5) == 0.6
    assert accuracy_of(0, 19, 20) == 9.5 / 20 and accuracy_of(0, 20, 20) is None
    assert accuracy_of(1, 38, 39) is None


def make_pairs(margins: list[float], length: float = 12.5) -> PairLogps:
    count = len(margins)
    zeros, ones = torch.zeros(count), torch.ones(count)
    return PairLogps(
        chosen=torch.tensor(margins), rejected=zeros, ref_chosen=zeros, ref_rejected=zeros, chosen_sums=zeros,
        chosen_lengths=length * ones, rejected_lengths=length * ones, weights=ones,
    )  # fmt: skip


def accuracy(objective: Objective, *groups: list[float], length: float = 12.5) -> float | None:
    metrics = PairMetrics()
    for margins in groups:
        metrics.add(objective.pair_losses(make_pairs(margins, length), length))
    assert "rewards/ties" not in metrics.means()
    return metrics.means()["rewards/accuracies"]


def test_the_metrics_of_steps_and_evaluations_have_the_same_accuracy() -> None:
    objective = Objective(terms={"sigmoid": 1.0}, beta=0.3, token_rounding=0.01)  # 0.1 nats a pair
    assert accuracy(objective, [0.05, -0.09], [0.0, 0.099]) is None
    assert accuracy(objective, [0.05, -0.09], [0.2, -0.2]) == 0.5
    assert accuracy(objective, [0.2, 0.2, 0.09, -0.2]) == 2.5 / 4
    assert accuracy(Objective(terms={"sigmoid": 1.0}), [1e-9, -1e-9, 0.0]) == 0.5  # exact without rounding


def test_a_loss_per_token_has_the_rounding_of_means() -> None:
    simpo = Objective(terms={"simpo": 1.0}, beta=2.0, token_rounding=0.01)  # 0.02 * sqrt(2 / 12.5) = 0.008
    assert accuracy(simpo, [0.0079 * 12.5, -0.0079 * 12.5]) is None
    assert accuracy(simpo, [0.0081 * 12.5, -0.0079 * 12.5]) == 0.75
