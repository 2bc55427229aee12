"""A sample of the training pairs that step zero compares before the first update."""

from __future__ import annotations

import heapq
from itertools import accumulate

import numpy as np

from dpo_cache.store import PairSet
from dpo_cache.types import Completion, Pair, Score, ScoredPair

MOST_BLOCKS = 64  # blocks of 256 pairs that are read to choose from: bounds the time before a long run
LEAST_PAIRS, MOST_PAIRS = 16, 32
SHARE = 8  # pairs of the run for each pair of the sample


def sample_size(num_trained: int) -> int:
    """The number of pairs to compare in a run that trains on `num_trained` pairs."""
    return min(MOST_PAIRS, max(LEAST_PAIRS, num_trained // SHARE))


def sample_pairs(pair_set: PairSet, selected: np.ndarray, number: int) -> list[ScoredPair]:
    """At most `number` of the selected pairs and the longest, in their order.

    Half of them are spread evenly over the set; the others are those whose cached log-prob per token is the
    highest or the lowest, where wrong values are likely to be. They are chosen from 64 blocks that are
    spread over the set, or from all. `selected` is bool, with one entry for each pair.
    """
    ends = [0, *accumulate(pair_set.block_sizes)]
    blocks = _spread(len(pair_set.block_sizes), MOST_BLOCKS)
    places: list[int] = []
    lengths: list[int] = []
    means: list[float] = []  # mean log-prob of each answer, in nats a token
    for block in blocks:
        for place, scored in enumerate(pair_set.read_block(block), start=ends[block]):
            if selected[place]:
                places.append(place)
                lengths.append(len(scored.pair.chosen) + len(scored.pair.rejected))
                means += [
                    scored.ref_chosen.logps / scored.pair.chosen.num_tokens,
                    scored.ref_rejected.logps / scored.pair.rejected.num_tokens,
                ]
    chosen = _choose(lengths, means, number)
    return [_copied(pair_set[places[index]]) for index in sorted(chosen)]


def _choose(lengths: list[int], means: list[float], number: int) -> set[int]:
    """Positions among the pairs: the longest, the extreme ones, and others that are spread over all."""
    if len(lengths) <= number:
        return set(range(len(lengths)))
    answers = range(len(means))
    high = [answer // 2 for answer in heapq.nlargest(number, answers, key=means.__getitem__)]
    low = [answer // 2 for answer in heapq.nsmallest(number, answers, key=means.__getitem__)]
    extreme = list(dict.fromkeys(one for both in zip(high, low, strict=True) for one in both))
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    # in order of importance; many positions are chosen for two reasons
    ordered = [longest, *extreme[: number // 2], *_spread(len(lengths), number // 2), *extreme[number // 2 :]]
    return set(list(dict.fromkeys(ordered))[: number + 1])


def _spread(count: int, number: int) -> list[int]:
    """At most `number` of `count` positions, from the first to the last at equal distances."""
    return np.unique(np.linspace(0, count - 1, min(count, number)).round().astype(int)).tolist()


def _copied(scored: ScoredPair) -> ScoredPair:
    """The pair with copied arrays, which keep no block in memory."""

    def completion(side: Completion) -> Completion:
        return Completion(side.prompt_ids.copy(), side.completion_ids.copy())

    def score(side: Score) -> Score:
        return Score(side.token_logps.copy(), side.imported_sum)

    pair = scored.pair
    return ScoredPair(
        Pair(pair.row, completion(pair.chosen), completion(pair.rejected)),
        score(scored.ref_chosen),
        score(scored.ref_rejected),
    )
