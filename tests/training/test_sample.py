"""The pairs that step zero compares: a bounded number, spread over the set, with the longest and the extreme."""

from pathlib import Path

import numpy as np
import pytest

from dpo_cache.store import PairSet, open_cache
from dpo_cache.training import sample
from dpo_cache.training.sample import sample_pairs, sample_size
from dpo_cache.types import Completion, Pair, Score, ScoredPair


def make_set(place: Path, count: int, *, longest: int = 0, highest: int = 0, lowest: int = 0) -> PairSet:
    generator = np.random.default_rng(0)

    def side(length: int, mean: float) -> tuple[Completion, Score]:
        ids = generator.integers(0, 99, length).astype(np.uint32)
        values = np.float32(mean) + generator.normal(0, 0.1, length).astype(np.float32)
        return Completion(np.array([1, 2], np.uint32), ids), Score(values)

    pairs = []
    for row in range(count):
        chosen, ref_chosen = side(60 if row == longest else 8, -2.0)
        mean = {highest: -0.5, lowest: -9.0}.get(row, -2.0)
        rejected, ref_rejected = side(8, mean)
        pairs.append(ScoredPair(Pair(row, chosen, rejected), ref_chosen, ref_rejected))
    cache = open_cache(place / "cache", create=True)
    writer = cache.write_pairs("pairs", "train")
    writer.add(pairs)
    writer.finish({"name": "pairs", "split": "train", "reference": "0" * 64, "pairs_digest": "1" * 64})
    return cache.pairs("pairs")


def rows(pairs: list[ScoredPair]) -> list[int]:
    return [scored.pair.row for scored in pairs]


def test_it_holds_the_longest_the_extreme_and_spread_pairs_in_their_order(tmp_path: Path) -> None:
    pair_set = make_set(tmp_path, 1000, longest=437, highest=811, lowest=612)
    found = rows(sample_pairs(pair_set, np.ones(1000, bool), 32))
    assert found == sorted(set(found)) and {437, 811, 612, 0, 999} <= set(found)
    assert len(found) == 33
    assert max(np.diff(found)) <= 1000 / 15 + 1


def test_only_selected_pairs_are_taken(tmp_path: Path) -> None:
    pair_set = make_set(tmp_path, 600, longest=437, highest=411, lowest=412)
    selected = np.arange(600) % 2 == 0
    found = rows(sample_pairs(pair_set, selected, 16))
    assert all(row % 2 == 0 for row in found) and 412 in found and 437 not in found


@pytest.mark.parametrize("count", [1, 5, 16])
def test_of_a_small_set_all_are_taken(tmp_path: Path, count: int) -> None:
    pair_set = make_set(tmp_path, count)
    assert rows(sample_pairs(pair_set, np.ones(count, bool), 16)) == list(range(count))


def test_of_a_large_set_few_blocks_are_read_and_none_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "MOST_BLOCKS", 4)
    pair_set = make_set(tmp_path, 256 * 12)
    read: list[int] = []
    read_block = PairSet.read_block
    monkeypatch.setattr(
        PairSet, "read_block", lambda self, block: (read.append(block), read_block(self, block))[1]
    )
    found = sample_pairs(pair_set, np.ones(len(pair_set), bool), 32)
    assert set(read) == {0, 4, 7, 11} and len(read) <= 8
    for scored in found:
        for array in (scored.pair.chosen.prompt_ids, scored.pair.rejected.completion_ids):
            assert array.base is None
        assert scored.ref_chosen.token_logps.base is None


def test_the_number_is_a_share_of_the_run() -> None:
    assert [sample_size(number) for number in (1, 100, 200, 256, 10**6)] == [16, 16, 25, 32, 32]
