"""Units are cut where neighbours share little, near the wanted size, and drawn in random order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.lm.forest.layout import count_forest_tokens, sort_completions
from dpo_cache.precomputing import cutting
from dpo_cache.precomputing.cutting import MIN_TOKENS, Units, UnitSize, cut_places, cut_unit, join
from dpo_cache.precomputing.fresh_keys import FreshKeys
from dpo_cache.precomputing.units import Unit, take
from dpo_cache.store import completion_key, open_cache
from dpo_cache.types import Completion, Score
from tests.conftest import make_completions


def unit_of(completions: list[Completion]) -> Unit:
    """A unit of distinct completions."""
    distinct = {completion_key(one): one for one in completions}
    rows = [[place] for place in range(len(distinct))]
    tokens = count_forest_tokens([*distinct.values()])
    return Unit([*distinct], [*distinct.values()], rows, tokens, "pairs/train")


def dialogues(count: int, seed: int = 0) -> Unit:
    """Four turns each, two answers a turn: a turn's prompt has all turns before."""
    generator = np.random.default_rng(seed)
    completions = []
    for _ in range(count):
        prompt = generator.integers(0, 250, int(generator.integers(5, 40))).astype(np.uint32)
        for _ in range(4):
            answers = [generator.integers(0, 250, int(size)).astype(np.uint32) for size in (12, 25)]
            completions += [Completion(prompt, answer) for answer in answers]
            prompt = np.concatenate([prompt, answers[0], generator.integers(0, 250, 9).astype(np.uint32)])
    return unit_of(completions)


def check_is_whole(units: list[Unit], whole: Unit) -> None:
    """The units have each completion once, with its key and rows, and know their tokens."""
    found = {
        key: (completion, rows)
        for unit in units
        for key, completion, rows in zip(unit.keys, unit.completions, unit.rows, strict=True)
    }
    assert sum(map(len, units)) == len(found) == len(whole)
    for key, completion, rows in zip(whole.keys, whole.completions, whole.rows, strict=True):
        assert found[key] == (completion, rows)
    for unit in units:
        assert unit.planned_tokens == count_forest_tokens(unit.completions)
        assert unit.pair_set == whole.pair_set


@pytest.mark.parametrize("unit_tokens", [1, 60, 200, 1000, 5000])
def test_units_have_each_completion_once(unit_tokens: int) -> None:
    whole = dialogues(40)
    check_is_whole(cut_unit(whole, unit_tokens), whole)


def test_a_unit_that_is_small_enough_stays_as_it_is() -> None:
    whole = dialogues(3)
    assert cut_unit(whole, whole.planned_tokens) == [whole]
    assert len(cut_unit(whole, whole.planned_tokens * 3 // 4 + 1)) == 1


def test_sizes_are_within_a_quarter_of_the_wanted_one() -> None:
    whole = dialogues(80)
    for unit_tokens in (500, 1000, 1777, 3000):
        sizes = np.array([unit.planned_tokens for unit in cut_unit(whole, unit_tokens)])
        assert len(sizes) > 3 and 0.75 <= sizes.min() / unit_tokens <= sizes.max() / unit_tokens <= 1.25


def test_a_unit_ends_where_the_fewest_tokens_are_shared_within_a_quarter() -> None:
    """Checked against all places: within the bounds of the first unit, none shares less."""
    whole = dialogues(80)
    order, shared = sort_completions(whole.completions)
    lengths = np.array([len(whole.completions[place]) for place in order])
    tokens = np.cumsum(lengths - shared)
    bounds = cut_places(lengths, shared, 1000)
    inside = [place for place in range(1, len(order)) if 750 <= tokens[place - 1] <= 1250]
    assert shared[bounds[1]] == min(shared[place] for place in inside) == 0


def test_units_of_8_192_tokens_cost_at_most_a_percent_of_more_tokens() -> None:
    whole = dialogues(700)
    assert whole.planned_tokens > 12 * MIN_TOKENS
    units = cut_unit(whole, MIN_TOKENS)
    assert sum(unit.planned_tokens for unit in units) <= 1.01 * whole.planned_tokens


def test_a_completion_longer_than_a_unit_is_one_with_what_shares_it() -> None:
    long = Completion(np.arange(400, dtype=np.uint32), np.arange(3, dtype=np.uint32))
    whole = unit_of([long, *make_completions()])
    units = cut_unit(whole, 50)
    check_is_whole(units, whole)
    assert max(unit.planned_tokens for unit in units) >= 403


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 49)), min_size=1, max_size=60),
    st.integers(1, 400),
)
def test_places_ascend_from_the_first_to_the_last(sizes: list[tuple[int, int]], unit_tokens: int) -> None:
    lengths = np.array([length for length, _ in sizes])
    shared = np.array([min(share, length - 1, before) for (length, share), before in zip(
        sizes, [0, *lengths[:-1]], strict=True)])  # fmt: skip
    places = cut_places(lengths, shared, unit_tokens)
    assert places[0] == 0 and places[-1] == len(sizes)
    assert all(one < next_one for one, next_one in pairwise(places))


def test_joined_units_are_the_unit_that_was_cut() -> None:
    whole = dialogues(20)
    joined = join(cut_unit(whole, 300))
    check_is_whole([joined], whole)
    assert joined.planned_tokens == whole.planned_tokens


# -- sizes -----------------------------------------------------------------------------------------------


def test_a_chosen_size_is_20_s_of_scoring() -> None:
    size = UnitSize(None)
    assert size.tokens == MIN_TOKENS
    size.note(8192, 0.5)
    assert size.tokens == 40 * 8192
    size.note(8192, 60.0)
    assert size.tokens == MIN_TOKENS, "never below"


def test_each_worker_gets_at_least_16_units_of_a_chosen_size() -> None:
    size = UnitSize(None, num_workers=4, run_tokens=lambda: 64 * 20_000)
    size.note(8192, 0.001)
    assert size.tokens == 20_000
    small = UnitSize(None, num_workers=4, run_tokens=lambda: 64 * 100)
    small.note(8192, 0.001)
    assert small.tokens == MIN_TOKENS


def test_a_fixed_size_stays() -> None:
    size = UnitSize(100, num_workers=4, run_tokens=lambda: 5)
    size.note(8192, 0.001)
    assert size.tokens == 100


def test_a_share_of_the_run_for_each_worker() -> None:
    size = UnitSize(None, one_each=True, run_tokens=lambda: 3200)
    assert size.tokens == 3200
    size.num_workers = 32  # as the driver learns
    assert size.tokens == 100


# -- drawing ---------------------------------------------------------------------------------------------


@pytest.fixture
def scores(tmp_path: Path) -> Any:
    return open_cache(tmp_path / "cache", create=True).scores("0" * 64)


def publish(scores: Any, unit: Unit) -> None:
    scores.publish([(key, Score(np.zeros(1, np.float32))) for key in unit.keys])


def drawn(units: Units, windows: list[Unit], monkeypatch: pytest.MonkeyPatch) -> Iterator[Unit]:
    """Draw from windows whose missing completions are these."""
    monkeypatch.setattr(cutting, "cut_units", lambda given, *_: iter(given))
    return units.draw(windows, "pairs/train")  # type: ignore[arg-type]


def test_everything_is_drawn_once(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [dialogues(20, seed) for seed in range(3)]
    units = Units(FreshKeys(scores), None, UnitSize(200))  # type: ignore[arg-type]
    found = [*drawn(units, windows, monkeypatch)]
    check_is_whole(found, join(windows))
    assert len(found) > 30 and units.completions_elsewhere == units.tokens_elsewhere == 0


def test_two_runs_draw_in_another_order(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [dialogues(20, seed) for seed in range(3)]
    orders = [
        [unit.keys[0] for unit in drawn(Units(FreshKeys(scores), None, UnitSize(200)), windows, monkeypatch)]  # type: ignore[arg-type]
        for _ in range(2)
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_without_a_size_a_window_is_a_unit(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [dialogues(5, seed) for seed in range(3)]
    found = [*drawn(Units(FreshKeys(scores), None, None), windows, monkeypatch)]  # type: ignore[arg-type]
    assert {id(one) for one in found} == {id(one) for one in windows}


def test_a_size_that_has_doubled_cuts_the_rest_again(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, size = dialogues(700), UnitSize(None)
    found = []
    for unit in drawn(Units(FreshKeys(scores), None, size), [whole], monkeypatch):  # type: ignore[arg-type]
        found.append(unit)
        size.note(unit.planned_tokens, unit.planned_tokens / 2000)  # 20 s are 40,000 tokens
    check_is_whole(found, whole)
    assert found[0].planned_tokens <= 1.25 * MIN_TOKENS
    assert all(0.66 * 40_000 <= unit.planned_tokens <= 1.34 * 40_000 for unit in found[1:])


def test_what_others_have_scored_meanwhile_is_left_out(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [dialogues(20, seed) for seed in range(3)]
    whole = join(windows)
    ticks = iter(range(10_000))
    fresh = FreshKeys(scores, clock=lambda: float(next(ticks)))
    monkeypatch.setattr("dpo_cache.precomputing.fresh_keys.SHARE", 1.0)  # before every unit
    units = Units(fresh, None, UnitSize(200))  # type: ignore[arg-type]
    other = open_cache(scores._folder.root, create=True).scores("0" * 64)
    elsewhere = take(whole, range(0, len(whole), 2))
    found = []
    for unit in drawn(units, windows, monkeypatch):
        if not found:
            publish(other, elsewhere)
        found.append(unit)
    keys = [key for unit in found for key in unit.keys]
    assert len(keys) == len(set(keys)) and {*keys} | {*elsewhere.keys} == {*whole.keys}
    assert {*keys} & {*elsewhere.keys} == {*found[0].keys} & {*elsewhere.keys}, "it was drawn before"
    assert units.completions_elsewhere == len(whole) - len(keys)
    assert units.tokens_elsewhere > 0


def test_runs_that_take_turns_share_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run publishes a unit before the other draws its next one, but after that one has begun."""
    monkeypatch.setattr("dpo_cache.precomputing.fresh_keys.SHARE", 1e9)
    whole = dialogues(200)
    runs = []
    for _ in range(2):
        scores = open_cache(tmp_path / "cache", create=True).scores("0" * 64)
        units = Units(FreshKeys(scores), None, UnitSize(200))  # type: ignore[arg-type]
        runs.append((scores, drawn(units, [whole], monkeypatch)))
    num_scored, begun = 0, [(scores, next(drawing, None)) for scores, drawing in runs]
    while any(unit for _, unit in begun):
        for place, (scores, unit) in enumerate(begun):
            if unit is not None:
                publish(scores, unit)
                num_scored += len(unit)
                begun[place] = scores, next(runs[place][1], None)
    assert num_scored <= 1.1 * len(whole), "twice the work without sharing"
