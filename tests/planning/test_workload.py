"""The lengths of a plan's pairs, by hand and compared with what training does with them."""

from pathlib import Path

import numpy as np
import pytest

import dpo_cache
from dpo_cache.errors import DataError, NotInCacheError
from dpo_cache.options.plan import PlanOptions
from dpo_cache.planning import workload
from dpo_cache.planning.workload import measure, read_workload, typical
from dpo_cache.training.batches import longest_pairs, split_step
from dpo_cache.types import Completion, Pair
from tests.conftest import chat_rows, write_rows


def pair(row: int, prompt: list[int], chosen: int, rejected: int) -> Pair:
    sides = (
        Completion(np.array(prompt, np.uint32), np.full(size, 9, np.uint32)) for size in (chosen, rejected)
    )
    return Pair(row, *sides)


def test_lengths_by_hand() -> None:
    found = measure([pair(0, [1, 2, 3], 2, 4), pair(1, [1, 2, 5], 1, 1)], "here", 1)
    assert (found.num_pairs, found.mean_prompt, found.mean_answer, found.longest) == (2, 3, 2, 7)
    assert found.row_tokens == 5 + 7 + 4 + 4
    assert found.forest_tokens == 3 + 4 + 1 + 1  # the longer answer of 9s holds the shorter one
    assert found.pair_tokens == ((3 + 2 + 4) + (3 + 1 + 1)) / 2
    assert [one.row for one in found.longest_pairs] == [0]
    assert not found.is_assumed


def test_nothing_to_measure() -> None:
    with pytest.raises(DataError, match=r"^here: no row of it makes a pair\.$"):
        measure([], "here", 1)


def test_windows_change_nothing_but_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair(row, [row % 3, row], 1 + row % 4, 2 + row % 5) for row in range(40)]
    whole = measure(pairs, "here", 4)
    monkeypatch.setattr(workload, "WINDOW", 7)
    parts = measure(iter(pairs), "here", 4)
    assert parts.forest_tokens >= whole.forest_tokens
    assert (parts.row_tokens, parts.pair_tokens, parts.longest) == (
        whole.row_tokens,
        whole.pair_tokens,
        whole.longest,
    )
    assert [one.row for one in parts.longest_pairs] == [one.row for one in whole.longest_pairs]


def test_typical_lengths() -> None:
    found = typical(4, 264)
    assert found.is_assumed and found.longest == 768 and found.pair_tokens == 1024
    assert [len(forest) for forest in found.forests(4096)] == [8]
    assert [len(forest) for forest in found.forests(2048)] == [4, 4]
    assert [len(forest) for forest in found.forests(100)] == [2] * 4  # a pair is not split
    assert [len(forest) for forest in found.forests(100, splits_pairs=True)] == [1] * 8
    assert [len(forest) for forest in found.forests(2048, splits_pairs=True)] == [4, 4]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("workload")
    data = write_rows(folder / "pairs.jsonl", chat_rows(12))
    dpo_cache.precompute(model_folder, data, folder / "cache")
    return folder


def test_a_pair_set_and_its_data_have_the_same_lengths(cache: Path, model_folder: str) -> None:
    stored = read_workload(PlanOptions(model=model_folder, cache=str(cache / "cache")), 264)
    data = read_workload(PlanOptions(model=model_folder, dataset=str(cache / "pairs.jsonl")), 264)
    for name in (
        "num_pairs",
        "mean_prompt",
        "mean_answer",
        "longest",
        "row_tokens",
        "forest_tokens",
        "pair_tokens",
    ):
        assert getattr(stored, name) == getattr(data, name), name
    assert stored.source == f"pairs/train of {cache / 'cache'}"


def test_forests_are_those_of_the_longest_training_step(cache: Path, model_folder: str) -> None:
    pair_set = dpo_cache.open_cache(cache / "cache").pairs("pairs")
    options = PlanOptions(model=model_folder, cache=str(cache / "cache"), batch_size=5)
    forests = read_workload(options, 264).forests(120)
    step = longest_pairs(pair_set, np.ones(len(pair_set), bool), 5)
    groups = sorted(split_step(step, 120), key=lambda group: group.num_tokens, reverse=True)
    assert len(groups) > 1
    assert [sum(map(len, forest)) for forest in forests] == [
        sum(len(scored.pair.chosen) + len(scored.pair.rejected) for scored in group.pairs) for group in groups
    ]


def test_a_pair_set_that_does_not_exist(cache: Path, model_folder: str) -> None:
    with pytest.raises(NotInCacheError, match="no pair set 'other'"):
        read_workload(PlanOptions(model=model_folder, cache=str(cache / "cache"), pairs="other"), 264)
