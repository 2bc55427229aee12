"""Which completions are audited: the same for the same data, the longest, the random ones, the unusual ones."""

import numpy as np
import pytest

from dpo_cache.precomputing import sampling
from dpo_cache.precomputing.sampling import Sampler
from dpo_cache.precomputing.units import Unit
from dpo_cache.store import completion_key
from dpo_cache.types import Completion


def make_unit(num: int, seed: int = 0, vocab_size: int = 50) -> Unit:
    generator = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, vocab_size, length).astype(np.uint32)

    completions = [Completion(ids(6), ids(int(generator.integers(4, 12)))) for _ in range(num)]
    return Unit([*map(completion_key, completions)], completions, [[row] for row in range(num)], 100)


def with_token(unit: Unit, place: int, token: int) -> Unit:
    completions = list(unit.completions)
    answer = completions[place].completion_ids.copy()
    answer[-1] = token
    completions[place] = Completion(completions[place].prompt_ids, answer)
    return Unit([*map(completion_key, completions)], completions, unit.rows, unit.planned_tokens)


def keys_of(unit: Unit, interval: int = 500) -> set[bytes]:
    return {unit.keys[place] for place in Sampler(interval).choose(unit)}


def test_the_same_completions_are_chosen_in_any_order() -> None:
    unit = make_unit(300)
    order = np.random.default_rng(1).permutation(300)
    shuffled = Unit(
        [unit.keys[place] for place in order],
        [unit.completions[place] for place in order],
        [unit.rows[place] for place in order],
        100,
    )
    assert keys_of(unit) == keys_of(shuffled) and len(keys_of(unit)) >= 8


def test_each_position_is_chosen_once_and_random_ones_come_first() -> None:
    unit = make_unit(300)
    chosen = Sampler(500).choose(unit)
    assert len(chosen) == len(set(chosen))
    assert [unit.keys[place] for place in chosen[:8]] == sorted(unit.keys)[:8]


@pytest.mark.parametrize(("interval", "least", "most"), [(1, 2000, 2000), (4, 430, 570), (500, 8, 60)])
def test_one_in_so_many_is_chosen_at_random(interval: int, least: int, most: int) -> None:
    assert least <= len(Sampler(interval).choose(make_unit(2000))) <= most


@pytest.mark.parametrize("num", [1, 5, 8, 9])
def test_of_few_completions_at_least_eight_or_all_are_chosen(num: int) -> None:
    assert len(Sampler(500).choose(make_unit(num))) >= min(num, 8)


def test_the_eight_are_of_the_run_and_not_of_each_unit() -> None:
    sampler = Sampler(10**9)
    numbers = [len(sampler.choose(make_unit(4, seed))) for seed in range(40)]
    assert numbers[:2] == [4, 4] and sum(numbers[2:]) <= 6, "later only what is longer than all before"


def test_the_longest_of_a_unit_is_chosen_if_it_is_longer_than_all_before() -> None:
    sampler, first, second = Sampler(10**9), make_unit(100), make_unit(100, seed=1)
    lengths = [len(completion) for completion in first.completions]
    assert max(lengths[place] for place in sampler.choose(first)) == max(lengths)
    assert not sampler.choose(second)
    longer = Completion(second.completions[7].prompt_ids, np.arange(90, dtype=np.uint32))
    second.completions[7] = longer
    assert 7 in sampler.choose(second)


@pytest.mark.parametrize("seed", range(5))
def test_a_token_that_only_few_completions_have_is_met(seed: int) -> None:
    """One completion in a hundred has it; of eight at random one has it in 8 % of the cases."""
    unit = make_unit(500, seed)
    for place in range(seed, 500, 100):
        unit = with_token(unit, place, 77)
    assert any(77 in unit.completions[place].completion_ids for place in Sampler(500).choose(unit))


def test_unusual_ones_are_few() -> None:
    """In data where each completion has tokens of its own."""
    sampler = Sampler(500)
    unit = make_unit(1000, vocab_size=2**20)
    chosen = sampler.choose(unit)
    num_drawn = max(8, sum(int.from_bytes(key[:8], "big") < 2**64 / 500 for key in unit.keys))
    assert len(chosen) <= num_drawn + 1 + sampling.UNUSUAL_FIRST + 1000 // sampling.UNUSUAL_EVERY
