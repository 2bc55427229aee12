"""Measures over many pairs: pure functions of numpy arrays with one entry for each pair.

`margins` are reward margins, chosen minus rejected, and `roundings` the largest margins that rounding
explains: see `losses/ties.py`. A pair whose margin is not larger is a tie, which counts half; any other pair
is right if its margin is above 0. The metrics of training count in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo_cache.losses.ties import accuracy_of

Z_95 = 1.959963984540054  # 97.5 % of a standard normal distribution is below this value
PERCENTILES = (5, 25, 50, 75, 95)
NUM_BINS = 10


@dataclass(frozen=True)
class Accuracy:
    """The number of right pairs among `count`, and the 95 % interval of the share in the whole population.

    Share and interval are None if almost all pairs are ties.
    """

    share: float | None
    low: float | None
    high: float | None
    right: int
    ties: int
    count: int


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation of the pairs and percentiles, by linear interpolation."""

    mean: float
    deviation: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence is at least `low` and below `high` (the last bin: up to 1). Values are None if
    there are none.
    """

    low: float
    high: float
    count: int
    predicted: float | None  # mean confidence
    observed: float | None  # share of the pairs that are right, ties counted half; None as `expected_error`


@dataclass(frozen=True)
class Calibration:
    """The agreement of `sigmoid(margin)` with the observed shares; see `measure_calibration`."""

    expected_error: float | None  # 0: calibrated; None if almost all pairs are ties
    brier: float  # 0: certain and right, 0.25: no information, 1: certain and wrong
    bins: list[Bin]


@dataclass(frozen=True)
class LengthGroup:
    """Pairs of some lengths in tokens, `least` to `most`."""

    name: str
    least: int
    most: int
    accuracy: Accuracy
    margin: float  # mean over the pairs


def measure_accuracy(margins: np.ndarray, roundings: np.ndarray | float = 0.0) -> Accuracy:
    """Share of the pairs that are right, with its Wilson interval; `margins` is not empty."""
    ties = np.abs(margins) <= roundings
    count, right, num_ties = len(margins), int((~ties & (margins > 0)).sum()), int(ties.sum())
    share = accuracy_of(right, num_ties, count)
    low, high = (None, None) if share is None else wilson_interval(right + num_ties / 2, count)
    return Accuracy(share, low, high, right, num_ties, count)


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), which stays within 0 and 1 and suits small counts.

    `(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)` for draws that are independent.
    """
    share, square = right / count, Z_95**2 / count
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count))
    low, high = ((share + square / 2 + sign * half) / (1 + square) for sign in (-1, 1))
    return (0.0 if right == 0 else low, 1.0 if right == count else high)  # exact, without rounding


def measure_spread(values: np.ndarray) -> Spread:
    """Mean, deviation (over n) and percentiles."""
    return Spread(
        float(values.mean()),
        float(values.std()),
        *(float(value) for value in np.percentile(values, PERCENTILES)),
    )


def logratio_per_token(policy_logps: np.ndarray, reference_logps: np.ndarray, lengths: np.ndarray) -> float:
    """Mean over all tokens of log policy minus log reference, in nats, from sums of completions and their
    lengths.
    """
    return float((policy_logps - reference_logps).sum() / lengths.sum())


def measure_calibration(
    margins: np.ndarray, roundings: np.ndarray | float = 0.0, num_bins: int = NUM_BINS
) -> Calibration:
    """Calibration of `p = sigmoid(margin)`, the probability that the chosen answer is the better one.

    The label is the same for every pair, so the observed share would be 1 in every bin of p. But which answer
    comes first is a convention, and swapping the answers turns p into 1 - p. So each pair is judged by the
    answer that the model prefers: its confidence is `max(p, 1 - p)`, 0.5 to 1, and its label is 1 if the
    preferred answer is the chosen one, else 0; a tie counts half. This is the reliability of p over all
    pairs, each taken in both orders.

    The expected calibration error is the mean over pairs of their bin's `|predicted - observed|`, in bins of
    equal width (Guo et al., arXiv:1706.04599, Eq. 3). The Brier score is the mean of `(1 - p)^2`, the same
    in both orders.
    """
    confidence = _sigmoid(np.abs(margins))
    ties = np.abs(margins) <= roundings
    right = np.where(ties, 0.5, margins > 0)
    edges = np.linspace(0.5, 1, num_bins + 1)
    places = np.minimum(np.searchsorted(edges, confidence, side="right") - 1, num_bins - 1)
    is_known = accuracy_of(0, int(ties.sum()), len(margins)) is not None
    bins = [
        _bin(edges[place], edges[place + 1], confidence[places == place], right[places == place], is_known)
        for place in range(num_bins)
    ]
    gaps = [
        entry.count * abs(entry.predicted - entry.observed)
        for entry in bins
        if entry.predicted is not None and entry.observed is not None
    ]
    error = sum(gaps) / len(margins) if is_known else None
    return Calibration(error, float((_sigmoid(-margins) ** 2).mean()), bins)


def by_longer_answer(
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
    margins: np.ndarray,
    roundings: np.ndarray | None = None,
) -> list[LengthGroup]:
    """The pairs whose chosen answer is the longer one, the shorter one, or as long. The lengths of a group
    are those of both answers together.
    """
    masks = {
        "chosen is longer": chosen_lengths > rejected_lengths,
        "chosen is shorter": chosen_lengths < rejected_lengths,
        "equally long": chosen_lengths == rejected_lengths,
    }
    return _groups(masks, chosen_lengths + rejected_lengths, margins, roundings)


def by_quartile(
    lengths: np.ndarray, margins: np.ndarray, roundings: np.ndarray | None = None
) -> list[LengthGroup]:
    """Quarters of the pairs by length. Pairs of equal length stay together, so quarters may differ in size or
    be missing.
    """
    quarters = np.searchsorted(np.quantile(lengths, (0.25, 0.5, 0.75)), lengths, side="left")
    names = ("shortest quarter", "second quarter", "third quarter", "longest quarter")
    masks = {name: quarters == index for index, name in enumerate(names)}
    return _groups(masks, lengths, margins, roundings)


def _bin(low: float, high: float, confidence: np.ndarray, right: np.ndarray, is_known: bool) -> Bin:
    if not len(confidence):
        return Bin(float(low), float(high), 0, None, None)
    observed = float(right.mean()) if is_known else None
    return Bin(float(low), float(high), len(confidence), float(confidence.mean()), observed)


def _groups(
    masks: dict[str, np.ndarray], lengths: np.ndarray, margins: np.ndarray, roundings: np.ndarray | None
) -> list[LengthGroup]:
    limits = np.zeros(len(margins)) if roundings is None else roundings
    return [
        LengthGroup(
            name,
            int(lengths[mask].min()),
            int(lengths[mask].max()),
            measure_accuracy(margins[mask], limits[mask]),
            float(margins[mask].mean()),
        )
        for name, mask in masks.items()
        if mask.any()
    ]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    """`1 / (1 + exp(-x))`, without overflow far below 0."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1, small) / (1 + small)
