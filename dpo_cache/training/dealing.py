"""Distributes the pairs of a step over ranks, such that all ranks have about as many tokens to run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.training.batches import CountTokens, completions_of, sort_pairs
from dpo_cache.types import ScoredPair

SHARED = 0.25  # least share of a pair's tokens that it has in common with the pair before in its cluster
CUTS = (math.inf, 1.0, 1 / 2, 1 / 4, 0.0)  # largest cluster, as a share of the tokens of a rank


@dataclass
class _Cluster:
    """Pairs that share tokens, and the tokens to run all of them."""

    pairs: list[ScoredPair]
    tokens: int


def deal_pairs(
    pairs: Sequence[ScoredPair], num_ranks: int, count_tokens: CountTokens = count_forest_tokens
) -> list[list[ScoredPair]]:
    """The pairs of each rank; some have none where there are fewer pairs than ranks.

    Pairs that share a prompt go to one rank, where the prompt is run once, unless the step ends sooner if it
    is run on several: of five ways to cut the clusters of such pairs, the one whose busiest rank has the
    fewest tokens is chosen. The result depends only on the arguments, so all ranks compute the same.
    """
    clusters = _clusters(sort_pairs(pairs), count_tokens)
    share = sum(tokens for cluster in clusters for _, _, tokens in cluster) / num_ranks
    dealt = [_deal([part for one in clusters for part in _cut(one, share * cut)], num_ranks) for cut in CUTS]
    best = min(dealt, key=lambda ranks: max(one.tokens for one in ranks))  # the first minimum, on all ranks
    return [one.pairs for one in best]


# A pair, the tokens that it takes by itself, and those that it adds to a run with the pair before.
_Entry = tuple[ScoredPair, int, int]


def _clusters(ordered: Sequence[ScoredPair], count_tokens: CountTokens) -> list[list[_Entry]]:
    """The pairs, in their order, in clusters whose neighbours share a good part of their tokens."""
    clusters: list[list[_Entry]] = []
    for scored in ordered:
        own = count_tokens(completions_of([scored]))
        if clusters:
            before, tokens_before, _ = clusters[-1][-1]
            added = count_tokens(completions_of([before, scored])) - tokens_before
            if own - added >= SHARED * own:
                clusters[-1].append((scored, own, added))
                continue
        clusters.append([(scored, own, own)])
    return clusters


def _cut(cluster: Sequence[_Entry], most_tokens: float) -> list[_Cluster]:
    """The cluster in parts of at most so many tokens, or of one pair."""
    parts: list[_Cluster] = []
    for scored, own, added in cluster:
        if parts and parts[-1].tokens + added <= most_tokens:
            parts[-1].pairs.append(scored)
            parts[-1].tokens += added
        else:
            parts.append(_Cluster([scored], own))
    return parts


def _deal(clusters: Sequence[_Cluster], num_ranks: int) -> list[_Cluster]:
    """One cluster for each rank: the largest one that is left goes to the rank with the fewest tokens."""
    ranks = [_Cluster([], 0) for _ in range(num_ranks)]
    for cluster in sorted(clusters, key=lambda one: one.tokens, reverse=True):
        least = min(ranks, key=lambda one: one.tokens)
        least.pairs += cluster.pairs
        least.tokens += cluster.tokens
    return ranks
