"""When the margin of a pair is rounding noise, and the accuracy of many pairs.

A log-prob that is computed twice, by other kernels or in other batches, differs by rounding. A margin that is
no larger than such differences has its sign by chance: the pair is a tie. The functions take numbers, numpy
arrays or tensors.
"""

from __future__ import annotations

from typing import Any

# Margins by rounding have a standard deviation of about half of this limit, so one in 20 is beyond it.
ROUNDINGS = 2.0
MOST_TIES = 0.95  # share of the pairs; with more of them, the others are beyond the limit by chance


def margin_rounding(
    token_rounding: float, chosen_lengths: Any, rejected_lengths: Any, *, per_token: bool = False
) -> Any:
    """The largest margin of the pairs' log-probs that rounding explains, in nats.

    `token_rounding` is the size of the differences in a token's log-prob, which are independent: over n
    tokens they add up to sqrt(n) times that. With `per_token` the log-probs are means over the tokens.
    """
    if per_token:
        return ROUNDINGS * token_rounding * (1 / chosen_lengths + 1 / rejected_lengths) ** 0.5
    return ROUNDINGS * token_rounding * (chosen_lengths + rejected_lengths) ** 0.5


def accuracy_of(right: float, ties: float, count: float) -> float | None:
    """The share of `count` pairs that are right, ties counted half.

    None where more than `MOST_TIES` of them are ties: nothing is known then.
    """
    return None if ties > MOST_TIES * count else (right + ties / 2) / count
