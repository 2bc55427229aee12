"""Scores that no pair set holds, shard by shard, and what is published of shards that are partly used."""

from pathlib import Path

import pytest

from dpo_cache.store import Cache, open_cache
from dpo_cache.store.format import shards
from dpo_cache.store.format.shards import read_shard
from dpo_cache.store.upkeep import key_ranges
from dpo_cache.store.upkeep.contents import read_manifests, shard_files
from dpo_cache.store.upkeep.unused_scores import UnusedScores, find_unused_scores, publish_used_rows
from tests.store.caches import add_pairs, add_reference, add_scores, key_of, make_cache, value


@pytest.fixture(autouse=True)
def many_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 150)
    monkeypatch.setattr(key_ranges, "BLOCK_BYTES", 150)
    monkeypatch.setattr(key_ranges, "RUN_BYTES", 1000)
    monkeypatch.setattr(key_ranges, "RANGE_BYTES", 1000)


def rows_in(cache: Cache, files: object) -> list[tuple[bytes, list[float]]]:
    """Keys and token log-probs of these shards, by key."""
    tables = [table for file in files for table in read_shard(cache.folder, file)]  # type: ignore[attr-defined]
    return sorted(
        row
        for table in tables
        for row in zip(table.column("key").to_pylist(), table.column("token_logps").to_pylist(), strict=True)
    )


def test_unused_completions_are_counted_by_shard(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", shards=(range(30), range(30, 50)), pairs=())
    (reference,) = cache.references()
    names = {
        len(rows_in(cache, [file])): (file, size)
        for file, size in shard_files(cache.folder, reference).items()
    }
    both = [UnusedScores(*names[30], 30, 30), UnusedScores(*names[20], 20, 20)]
    assert sorted(find_unused_scores(cache.folder, reference, {}), key=str) == sorted(both, key=str)
    add_pairs(cache, reference, [(0, 1), (2, 40), (0, 2)])  # one completion in several rows
    add_pairs(cache, reference, [(number, number + 1) for number in range(30, 48, 2)], name="more")
    found = find_unused_scores(cache.folder, reference, read_manifests(cache))
    assert sorted(found, key=str) == sorted(
        [UnusedScores(*names[30], 30, 27), UnusedScores(*names[20], 20, 2)], key=str
    )
    add_pairs(cache, reference, [(number, number + 1) for number in range(0, 50, 2)], name="all")
    assert find_unused_scores(cache.folder, reference, read_manifests(cache)) == []


def test_pair_sets_of_another_reference_use_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", shards=(range(4),), pairs=())
    (reference,) = cache.references()
    add_pairs(cache, add_reference(cache, "b"), [(0, 1)])
    (found,) = find_unused_scores(cache.folder, reference, read_manifests(cache))
    assert (found.num_rows, found.num_unused) == (4, 4)


def test_the_used_rows_of_several_shards_are_published_with_their_values(tmp_path: Path) -> None:
    cache = make_cache(
        tmp_path / "cache", shards=(range(30), range(30, 50)), pairs=[(0, 1), (2, 40), (33, 49)]
    )
    (reference,) = cache.references()
    before = shard_files(cache.folder, reference)
    publish_used_rows(cache.folder, list(before))
    new = shard_files(cache.folder, reference).keys() - before.keys()
    assert rows_in(cache, new) == sorted(
        (key_of(number), value(number).token_logps.tolist()) for number in (0, 1, 2, 33, 40, 49)
    )


def test_of_a_completion_in_several_shards_each_value_stays(tmp_path: Path) -> None:
    """Else `gc` would decide between values that differ, which is `verify`'s to report."""
    cache = open_cache(tmp_path / "cache", create=True)
    reference = add_reference(cache)
    for shift in (0.0, 0.25, 0.5):
        add_scores(cache, reference, [1, 2, 3 + int(4 * shift)], shift=shift)
    add_pairs(cache, reference, [(1, 3)])
    before = shard_files(cache.folder, reference)
    publish_used_rows(cache.folder, list(before))
    new = shard_files(cache.folder, reference).keys() - before.keys()
    expected = [(1, 0.0), (1, 0.25), (1, 0.5), (3, 0.0)]
    assert rows_in(cache, new) == sorted(
        (key_of(number), value(number, shift).token_logps.tolist()) for number, shift in expected
    )
