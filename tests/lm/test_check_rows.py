"""The rows of the self-check: past every length, to the end of a chunk, and within their cost."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_cache.lm.check_rows import FREE_TOKENS, SHARE, START_TOKENS, CheckRows, Run, plan_rows, short_rows
from dpo_cache.lm.config_limits import POSITION, WINDOW, Limit
from dpo_cache.lm.forest.layout import build_forest, count_forest_tokens


def cost(rows: CheckRows, num_ways: int = 1) -> int:
    """Tokens of the check besides the short rows: own forwards, and the forest in each way."""
    whole = count_forest_tokens([*rows.filler, *rows.compared]) - count_forest_tokens(rows.short)
    return sum(map(len, rows.long)) + num_ways * whole


def window(tokens: int) -> Limit:
    return Limit(tokens, "sliding_window", WINDOW)


def test_rows_pass_each_length_and_reach_the_longest_row() -> None:
    rows = plan_rows(264, [window(40), window(200), window(900)], Run(600, 1024))
    assert [len(row) for row in rows.long] == [64, 224, 600] and rows.unreached == []
    longest = rows.long[-1].sequence_ids
    assert all(np.array_equal(row.sequence_ids, longest[: len(row)]) for row in rows.long)


def test_a_length_just_below_the_longest_row_is_passed_as_far_as_rows_do() -> None:
    rows = plan_rows(264, [window(595)], Run(600, 1024))
    assert [len(row) for row in rows.long] == [600]


def test_the_other_rows_are_at_the_end_of_a_full_chunk() -> None:
    rows = plan_rows(264, [], Run(64, 1024))
    completions = [*rows.filler, *rows.compared]
    forest = build_forest(completions)
    assert len(forest) == rows.chunk_tokens == 1024
    compared = forest.targets[len(rows.filler) :]
    assert min(int(targets.min()) for targets in compared) > 1024 - 200


@pytest.mark.parametrize("run_tokens", [0, 1_000, 20_000, 500_000])
@pytest.mark.parametrize("limits", [[], [window(100), window(700), window(3000)]])
@pytest.mark.parametrize("num_ways", [1, 2])
@pytest.mark.parametrize("is_known_code", [True, False])
def test_the_cost_is_within_the_stated_bound(
    run_tokens: int, limits: list[Limit], num_ways: int, is_known_code: bool
) -> None:
    for longest in (100, 1000, 5000):
        run = Run(longest, 2048, run_tokens, num_ways)
        rows = plan_rows(264, limits, run, is_known_code=is_known_code)
        start = START_TOKENS if limits or not is_known_code else 0
        assert cost(rows, num_ways) <= start + SHARE * run_tokens + (1 + num_ways) * FREE_TOKENS


def test_a_length_that_costs_too_much_is_not_reached() -> None:
    limits = [window(700), Limit(8192, "floor_scale", POSITION)]
    rows = plan_rows(264, limits, Run(9000, 1024, 50_000))
    assert [len(row) for row in rows.long] == [724] and rows.unreached == [limits[1]]
    rows = plan_rows(264, limits, Run(9000, 1024, 400_000))
    assert [len(row) for row in rows.long] == [724, 8216] and rows.unreached == []


def test_a_plain_model_pays_only_its_share() -> None:
    rows = plan_rows(264, [], Run(1000, 1024, 0))
    assert rows.long == [] and rows.filler == [] and rows.unreached == []


def test_all_lengths_of_other_code_count() -> None:
    rows = plan_rows(264, [], Run(800, 1024, 0), is_known_code=False)
    assert len(rows.long[-1]) == 800 and rows.unreached == []
    rows = plan_rows(264, [], Run(4000, 1024, 0), is_known_code=False)
    assert [str(limit) for limit in rows.unreached] == ["`longest row` 4,000"]


def test_no_row_is_longer_than_memory_allows() -> None:
    rows = plan_rows(264, [window(300)], Run(600, 1024), most_length=200)
    assert max(len(row) for row in [*rows.filler, *rows.compared]) <= 200
    assert rows.unreached == [window(300)]


def test_long_rows_use_only_tokens_of_the_short_ones() -> None:
    """So that a damaged embedding of another token is attributed to the rows of the data that have it."""
    rows = plan_rows(264, [], Run(600, 2048))
    known = set(np.concatenate([row.sequence_ids for row in rows.short]))
    assert {token for row in rows.long for token in row.sequence_ids} <= known
    assert {token for row in rows.filler for token in row.sequence_ids} <= known | {0}


@pytest.mark.parametrize("longest", [2, 3, 14, 20, 32, 33])
def test_short_rows_fit_into_the_longest_row(longest: int) -> None:
    rows = short_rows(264, longest)
    assert min(longest, 22) <= max(map(len, rows)) <= longest
    assert all(len(row.prompt_ids) and row.num_tokens for row in rows)
