"""Upkeep of a cache takes work in proportion to its size: four times as many files, four times as many reads."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_cache.store import Cache, open_cache
from dpo_cache.store.format import shards
from dpo_cache.store.format.parquet import ParquetReader
from dpo_cache.store.upkeep import key_ranges, named_files
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.diff import diff_caches
from dpo_cache.store.upkeep.gc import collect_garbage, find_garbage
from dpo_cache.store.upkeep.merge import merge_caches
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_pairs, add_reference, add_scores

ROWS = 12  # of a shard
OVERHEAD = 1.25  # row groups that hold two ranges are read for both


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range holds about two of the shards."""
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 10**6)
    monkeypatch.setattr(key_ranges, "BLOCK_BYTES", 100)
    monkeypatch.setattr(key_ranges, "RUN_BYTES", 2000)
    monkeypatch.setattr(key_ranges, "RANGE_BYTES", 2000)


def make(root: Path, num_shards: int, shift: float = 0.0) -> Cache:
    """A cache of so many shards, with one completion in two of them, and half of the completions in pairs."""
    cache = open_cache(root, create=True)
    reference = add_reference(cache)
    for start in range(0, num_shards * ROWS, ROWS):
        add_scores(cache, reference, range(start, start + ROWS), shift=shift)
    add_scores(cache, reference, [0, 10**6], shift=shift)
    add_pairs(cache, reference, [(row, row + 1) for row in range(0, num_shards * ROWS, 4)], shift=shift)
    return cache


def compact(root: Path, num_shards: int) -> None:
    cache = Cache(root / str(num_shards))
    assert compact_reference(cache, cache.references()[0]).duplicates == 1


def verify(root: Path, num_shards: int) -> None:
    assert verify_cache(root / str(num_shards)).is_whole


def gc(root: Path, num_shards: int) -> None:
    assert len(find_garbage(Cache(root / str(num_shards)), scores=True, grace_s=0)) > num_shards // 2


def collect(root: Path, num_shards: int) -> None:
    assert len(collect_garbage(Cache(root / str(num_shards)), scores=True, grace_s=0)) > num_shards // 2


def diff(root: Path, num_shards: int) -> None:
    (found,) = diff_caches(root / str(num_shards), root / f"{num_shards}-other").scores.values()
    assert found.both == found.differing == num_shards * ROWS + 1


def merge(root: Path, num_shards: int) -> None:
    report = merge_caches([root / str(num_shards)], root / f"{num_shards}-other", prefer="dest")
    assert [*report.overruled.values()] == [num_shards * ROWS + 1]


@pytest.mark.rotating(2)
@pytest.mark.parametrize("operation", [compact, verify, gc, collect, diff, merge])
def test_reads_grow_with_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: Callable[[Path, int], None]
) -> None:
    reads: Counter[str] = Counter()
    for owner, name in ((ParquetReader, "read_group"), (key_ranges._Runs, "read")):
        real = getattr(owner, name)

        def count(*given: object, name: str = name, real=real) -> object:
            reads[name] += 1
            return real(*given)

        monkeypatch.setattr(owner, name, count)
    found = {}
    for num_shards in (8, 32):
        make(tmp_path / str(num_shards), num_shards)
        make(tmp_path / f"{num_shards}-other", num_shards, shift=0.25)
        reads.clear()
        operation(tmp_path, num_shards)
        found[num_shards] = dict(reads)
    assert found[32]["read_group"] <= OVERHEAD * 4 * found[8]["read_group"]
    # a block of a run that holds two ranges is read for both, and there are more runs and more ranges
    assert found[32].get("read", 0) <= 2 * 4 * found[8].get("read", 1)


def test_gc_reads_each_manifest_a_few_times_however_many_files_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a manifest names a file is looked up in a set that is made once."""
    cache = open_cache(tmp_path / "cache", create=True)
    for number in range(6):
        reference = add_reference(cache, "abcdef"[number])
        for start in range(0, 20, 4):
            add_scores(cache, reference, range(start, start + 4))
        add_pairs(cache, reference, [(0, 1), (2, 3)], name=f"set-{number}")
    real, calls = named_files.part_files, []
    monkeypatch.setattr(named_files, "part_files", lambda manifest: calls.append(1) or real(manifest))
    assert find_garbage(cache, grace_s=0) == []
    assert len(calls) == 6
