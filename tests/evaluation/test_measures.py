"""Each measure on numbers computed by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cache.evaluation.measures import (
    by_longer_answer,
    by_quartile,
    logratio_per_token,
    measure_accuracy,
    measure_calibration,
    measure_spread,
    wilson_interval,
)

# margins whose sigmoid is the share
LOGIT = {share: math.log(share / (1 - share)) for share in (0.52, 0.58, 0.8, 0.95)}


def test_a_tie_counts_half() -> None:
    found = measure_accuracy(np.array([1.0, -2.0, 0.0, 3.0, 0.0]))
    assert (found.share, found.right, found.ties, found.count) == (0.6, 2, 2, 5)
    assert (found.low, found.high) == wilson_interval(3, 5)


def test_a_margin_within_rounding_is_a_tie() -> None:
    found = measure_accuracy(np.array([1.0, -2.0, 0.1, 3.0, -0.1]), np.array([0.1, 0.1, 0.1, 4.0, 0.09]))
    assert (found.share, found.right, found.ties) == (0.4, 1, 2)


def test_there_is_no_accuracy_where_margins_are_rounding_noise() -> None:
    margins = np.random.default_rng(0).normal(0, 1e-5, 38)
    for found in (
        measure_accuracy(margins, 1e-4),
        by_quartile(np.ones(38), margins, np.full(38, 1e-4))[0].accuracy,
    ):
        assert (found.share, found.low, found.high, found.right, found.ties) == (None, None, None, 0, 38)
    assert measure_calibration(margins, 1e-4).expected_error is None
    margins[0] = 1.0  # one of 38 is less than one in 20: as many are beyond the limit by chance
    assert measure_accuracy(margins, 1e-4).share is None
    margins[1] = 1.0
    assert measure_accuracy(margins, 1e-4).share == (2 + 18) / 38


def test_the_interval_is_wilsons() -> None:
    # n = 10, p = 0.8, z^2 = 3.8415: (0.8 + 0.19207 +- 1.96 sqrt(0.016 + 0.0096)) / 1.38415, sqrt = 0.16001
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_interval_holds_the_share_and_is_narrower_with_more_pairs(count: int, part: float) -> None:
    right = round(part * count)
    low, high = wilson_interval(right, count)
    near_low, near_high = wilson_interval(4 * right, 4 * count)
    assert 0 <= low <= right / count <= high <= 1
    assert near_high - near_low < high - low


def test_a_spread_has_mean_deviation_and_percentiles() -> None:
    found = measure_spread(np.array([1.0, 2.0, 3.0, 4.0, 10.0]))
    assert (found.mean, found.median, found.p25, found.p75) == (4.0, 3.0, 2.0, 4.0)
    # deviations -3, -2, -1, 0, 6: squares add up to 50
    assert found.deviation == pytest.approx(math.sqrt(10))
    # a fifth of the way from the ends
    assert (found.p5, found.p95) == (pytest.approx(1.2), pytest.approx(8.8))


def test_log_ratios_are_means_over_tokens_not_over_answers() -> None:
    policy, reference, lengths = np.array([-8.0, -1.0]), np.array([-10.0, -2.0]), np.array([9, 1])
    # 3 nats over 10 tokens; by answers 0.61
    assert logratio_per_token(policy, reference, lengths) == pytest.approx(0.3)


def test_calibration_of_six_pairs() -> None:
    """Confidences 0.95 right, 0.95 wrong, 0.58 right, 0.58 right, 0.52 wrong, and a tie."""
    margins = np.array([LOGIT[0.95], -LOGIT[0.95], LOGIT[0.58], LOGIT[0.58], -LOGIT[0.52], 0.0])
    found = measure_calibration(margins, num_bins=5)  # 0.5, 0.6, 0.7, 0.8, 0.9, 1
    assert [entry.count for entry in found.bins] == [4, 0, 0, 0, 2]
    assert (found.bins[0].predicted, found.bins[0].observed) == (
        pytest.approx((0.58 + 0.58 + 0.52 + 0.5) / 4),
        2.5 / 4,
    )
    assert (found.bins[4].predicted, found.bins[4].observed) == (pytest.approx(0.95), 0.5)
    assert (found.bins[1].predicted, found.bins[1].observed) == (None, None)
    assert found.expected_error == pytest.approx((4 * (0.625 - 0.545) + 2 * 0.45) / 6)
    assert found.brier == pytest.approx((0.05**2 + 0.95**2 + 2 * 0.42**2 + 0.52**2 + 0.5**2) / 6)


def test_a_model_that_is_right_as_often_as_it_is_confident_is_calibrated() -> None:
    # certain to 0.8, right in 8 of 10
    margins = np.repeat(LOGIT[0.8], 10) * np.where(np.arange(10) < 8, 1, -1)
    found = measure_calibration(margins)
    assert found.expected_error == pytest.approx(0, abs=1e-12)
    assert found.brier == pytest.approx(0.8 * 0.04 + 0.2 * 0.64)


def test_calibration_at_the_ends() -> None:
    certain = measure_calibration(np.array([1e4, 1e4]))
    assert (certain.expected_error, certain.brier, certain.bins[-1].count) == (0.0, 0.0, 2)
    wrong = measure_calibration(np.array([-1e4]))
    assert (wrong.expected_error, wrong.brier) == (1.0, 1.0)
    uncertain = measure_calibration(np.zeros(3))
    assert (uncertain.expected_error, uncertain.brier) == (None, 0.25)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40))
def test_folding_is_the_reliability_of_pairs_taken_in_both_orders(values: list[float]) -> None:
    margins = np.array(values)
    found = measure_calibration(margins)
    both, labels = np.concatenate([margins, -margins]), np.repeat([1.0, 0.0], len(margins))
    shares = 1 / (1 + np.exp(-both))
    assert sum(entry.count for entry in found.bins) == len(margins)
    assert found.brier == pytest.approx(((shares - labels) ** 2).mean(), abs=1e-9)
    above = both >= 0  # each pair once, a tie twice, with either label
    weights = np.where(both == 0, 0.5, 1.0)
    observed = (labels * weights)[above].sum() / weights[above].sum()
    if found.expected_error is None:  # almost all pairs are ties
        assert {entry.observed for entry in found.bins} == {None}
        return
    means = [(entry.count, entry.observed) for entry in found.bins if entry.observed is not None]
    assert sum(count * share for count, share in means) / len(margins) == pytest.approx(observed, abs=1e-9)


def test_pairs_by_which_answer_is_longer() -> None:
    chosen, rejected = np.array([5, 2, 3, 9]), np.array([3, 4, 3, 1])
    groups = {
        entry.name: entry for entry in by_longer_answer(chosen, rejected, np.array([1.0, -1.0, 0.5, -3.0]))
    }
    assert list(groups) == ["chosen is longer", "chosen is shorter", "equally long"]
    longer = groups["chosen is longer"]
    assert (longer.accuracy.count, longer.accuracy.share, longer.margin, longer.least, longer.most) == (
        2,
        0.5,
        -1.0,
        8,
        10,
    )
    assert (groups["chosen is shorter"].accuracy.share, groups["equally long"].margin) == (0.0, 0.5)
    assert [entry.name for entry in by_longer_answer(chosen[:1], rejected[:1], np.ones(1))] == [
        "chosen is longer"
    ]


def test_quarters_hold_equal_lengths_together() -> None:
    lengths = np.array([8, 1, 2, 7, 3, 6, 4, 5])
    groups = by_quartile(lengths, np.where(lengths > 4, 1.0, -1.0))
    assert [(entry.least, entry.most, entry.accuracy.share) for entry in groups] == [
        (1, 2, 0.0),
        (3, 4, 0.0),
        (5, 6, 1.0),
        (7, 8, 1.0),
    ]
    assert [entry.name.split()[0] for entry in groups] == ["shortest", "second", "third", "longest"]
    alike = by_quartile(np.full(9, 4), np.ones(9))
    assert [(entry.name, entry.accuracy.count) for entry in alike] == [("shortest quarter", 9)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_each_pair_is_in_one_quarter(lengths: list[int]) -> None:
    groups = by_quartile(np.array(lengths), np.array(lengths, float))
    assert sum(entry.accuracy.count for entry in groups) == len(lengths)
    ends = [(entry.least, entry.most) for entry in groups]
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert sum(entry.margin * entry.accuracy.count for entry in groups) == pytest.approx(sum(lengths))
