"""Pairs dealt to ranks: each once, with balanced tokens, and with shared prompts together where that pays."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.training.batches import completions_of
from dpo_cache.training.dealing import deal_pairs
from dpo_cache.types import Completion, Pair, Score, ScoredPair
from tests.training.test_batches import make_pairs


def rows_of(dealt: list[list[ScoredPair]]) -> list[list[int]]:
    return [sorted(scored.pair.row for scored in pairs) for pairs in dealt]


def tokens_of(dealt: list[list[ScoredPair]]) -> list[int]:
    return [count_forest_tokens(completions_of(pairs)) if pairs else 0 for pairs in dealt]


def pair(row: int, prompt: int, prompt_tokens: int, answer_tokens: int) -> ScoredPair:
    generator = np.random.default_rng([row, prompt])
    prompt_ids = np.random.default_rng(prompt).integers(0, 1000, prompt_tokens).astype(np.uint32)
    chosen, rejected = (
        Completion(prompt_ids, generator.integers(0, 1000, answer_tokens).astype(np.uint32)) for _ in range(2)
    )
    scores = (Score(np.zeros(answer_tokens, np.float32)) for _ in range(2))
    return ScoredPair(Pair(row, chosen, rejected), *scores)


@settings(max_examples=50, deadline=None)
@given(num_pairs=st.integers(1, 40), num_ranks=st.integers(1, 9), seed=st.integers(0, 1000))
def test_every_pair_is_dealt_once_whatever_their_order(num_pairs: int, num_ranks: int, seed: int) -> None:
    pairs = make_pairs(num_pairs, seed)
    dealt = rows_of(deal_pairs(pairs, num_ranks))
    assert len(dealt) == num_ranks and sorted(row for rows in dealt for row in rows) == list(range(num_pairs))
    if num_ranks <= num_pairs == len({scored.pair.chosen.sequence_ids.tobytes() for scored in pairs}):
        random.Random(seed).shuffle(pairs)
        assert rows_of(deal_pairs(pairs, num_ranks)) == dealt


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), num_ranks=st.integers(1, 8))
def test_no_rank_has_more_than_its_share_and_one_pair(lengths: list[int], num_ranks: int) -> None:
    pairs = [pair(row, row, 5, length) for row, length in enumerate(lengths)]
    tokens = tokens_of(deal_pairs(pairs, num_ranks))
    longest = max(tokens_of([[one] for one in pairs]))
    assert max(tokens) <= sum(tokens) / num_ranks + longest


def test_pairs_of_one_prompt_stay_together() -> None:
    pairs = [pair(row, row // 3, 40, 10) for row in range(12)]
    random.Random(0).shuffle(pairs)
    dealt = rows_of(deal_pairs(pairs, 2))
    assert sorted(map(len, dealt)) == [6, 6]
    for rows in dealt:
        assert len({row // 3 for row in rows}) == 2  # whole prompts
    assert sum(tokens_of(deal_pairs(pairs, 2))) == 4 * (40 + 6 * 10)


def test_pairs_of_one_prompt_are_run_on_all_ranks_if_the_step_has_no_other() -> None:
    pairs = [pair(row, 0, 40, 100) for row in range(8)]
    assert list(map(len, deal_pairs(pairs, 4))) == [2, 2, 2, 2]


def test_a_prompt_that_all_share_does_not_put_all_on_one_rank() -> None:
    start = np.arange(50, dtype=np.uint32)
    pairs = []
    for row in range(12):
        one = pair(row, row // 2, 30, 10).pair
        sides = [
            Completion(np.concatenate([start, side.prompt_ids]), side.completion_ids)
            for side in (one.chosen, one.rejected)
        ]
        pairs.append(ScoredPair(Pair(row, *sides), *(Score(np.zeros(10, np.float32)) for _ in range(2))))
    dealt = deal_pairs(pairs, 3)
    assert list(map(len, dealt)) == [4, 4, 4]
    assert all(len({row // 2 for row in rows}) == 2 for rows in rows_of(dealt))


@pytest.mark.parametrize("num_pairs", [1, 2])
def test_a_step_smaller_than_the_ranks_leaves_some_without_pairs(num_pairs: int) -> None:
    dealt = deal_pairs(make_pairs(num_pairs), 4)
    assert sorted(map(len, dealt)) == [0] * (4 - num_pairs) + [1] * num_pairs


def test_rows_with_padding_are_dealt_by_their_padded_tokens() -> None:
    def padded(completions: list[Completion]) -> int:
        return max(map(len, completions)) * len(completions)

    pairs = [pair(row, row, 5, 50 if row < 2 else 10) for row in range(8)]
    dealt = rows_of(deal_pairs(pairs, 2, padded))
    assert [sum(row < 2 for row in rows) for rows in dealt] == [1, 1]
