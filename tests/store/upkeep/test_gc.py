"""gc: which files are garbage, which stay, and what others at work notice of it."""

import os
from pathlib import Path

import pytest

from dpo_cache.errors import CorruptShardError, NotInCacheError
from dpo_cache.store import Cache
from dpo_cache.store.upkeep import gc as gc_module
from dpo_cache.store.upkeep.gc import Garbage, collect_garbage, find_garbage, find_unneeded
from dpo_cache.store.upkeep.repair import repair_cache
from dpo_cache.store.upkeep.run_record import RunRecord
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_pairs, add_reference, key_of, value
from tests.store.conftest import flip_file
from tests.store.upkeep.conftest import reference_of, values


def age(root: Path, seconds: float = 2 * 86_400.0) -> None:
    """Everything was written two days ago."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_a_cache_in_use_has_no_garbage(cache: Cache, root: Path) -> None:
    age(root)
    assert find_garbage(cache) == []


def test_parts_that_no_manifest_names_go_after_the_grace(cache: Cache, root: Path) -> None:
    old = next((root / "pairs/demo/train").glob("*.parquet"))
    add_pairs(cache, reference_of(cache), [(2, 3)])
    assert find_garbage(cache) == []  # a writer may be about to publish a manifest that names it
    age(root)
    name = old.relative_to(root).as_posix()
    assert find_garbage(cache) == [Garbage(name, old.stat().st_size, "no manifest names it")]
    assert old.exists()
    collect_garbage(cache)
    assert not old.exists() and verify_cache(root).is_whole and len(cache.pairs("demo")) == 1


def test_a_reference_without_pair_sets_goes_unless_it_is_kept_or_young(cache: Cache, root: Path) -> None:
    age(root)
    lonely = add_reference(cache, "b")
    add_scores_of(cache, lonely, range(5))
    assert find_garbage(cache) == []
    age(root)
    assert {entry.file.split("/")[1] for entry in find_garbage(cache)} == {lonely}
    assert find_garbage(cache, keep=[lonely[:8]]) == []
    add_scores_of(cache, lonely, range(5, 8))  # somebody is at it again
    assert find_garbage(cache) == []
    age(root)
    assert len(collect_garbage(cache)) == 3
    assert (
        cache.references() == [entry for entry in cache.references() if entry != lonely]
        and verify_cache(root).is_whole
    )


def add_scores_of(cache: Cache, reference: str, numbers: range) -> None:
    cache.scores(reference).publish([(key_of(number), value(number)) for number in numbers])


def test_keep_names_what_is_there(cache: Cache) -> None:
    assert find_garbage(cache, keep=["demo", "demo/train"]) == []
    with pytest.raises(NotInCacheError, match="no reference whose id starts with 'nothing'"):
        find_garbage(cache, keep=["nothing"])


def test_scores_that_no_pair_set_holds_go_only_with_scores(cache: Cache, root: Path) -> None:
    age(root)
    assert find_garbage(cache) == []
    found = find_garbage(cache, scores=True)
    # completions 0 to 3 of the first shard are used
    assert len(found) == 8 and sum(entry.unused_rows is not None for entry in found) == 1
    before = values(cache, range(4))
    collect_garbage(cache, scores=True)
    assert values(cache, range(4)) == before
    assert not cache.scores(reference_of(cache)).contains([key_of(number) for number in range(4, 40)]).any()
    assert verify_cache(root).is_whole and find_garbage(cache, scores=True, grace_s=0) == []


def test_scratch_and_what_was_set_aside_go_after_the_grace(cache: Cache, root: Path) -> None:
    scratch = next(root.glob("references/*/scores")) / ".abc.parquet.1234abcd.tmp"
    scratch.write_bytes(b"half")
    flip_file(next(root.glob("pairs/demo/train/*.parquet")), 50)
    repair_cache(root, verify_cache(root))
    assert find_garbage(cache) == []
    age(root)
    assert {entry.why for entry in find_garbage(cache)} == {
        "temporary file of a writer that was killed",
        "set aside by `dpo-cache verify --repair`",
    }
    collect_garbage(cache)
    assert not scratch.exists() and cache.folder.hidden() == {}


def test_a_damaged_manifest_stops_it(cache: Cache, root: Path) -> None:
    flip_file(root / "pairs/demo/train/manifest.json", 30)
    with pytest.raises(CorruptShardError):
        find_garbage(cache)


def test_what_a_pair_set_came_to_need_meanwhile_stays(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lonely = add_reference(cache, "b")
    add_scores_of(cache, lonely, range(5))
    age(root)
    real, calls = gc_module.find_garbage, []

    def find_then_let_another_publish(*given: object, **options: object) -> list[Garbage]:
        found = real(*given, **options)  # type: ignore[arg-type]
        if not calls:
            add_pairs(Cache(root), lonely, [(0, 1)], name="late")
        calls.append(found)
        return found

    monkeypatch.setattr(gc_module, "find_garbage", find_then_let_another_publish)
    assert collect_garbage(cache) == [] and len(calls[0]) == 2
    assert verify_cache(root).is_whole and lonely in cache.references()


def test_what_is_recent_is_found_apart_and_stays_for_a_day(cache: Cache, root: Path) -> None:
    lonely = add_reference(cache, "b")
    add_scores_of(cache, lonely, range(5))  # of an interrupted run
    age(root, 23 * 3600.0)
    found = find_unneeded(cache)
    assert found.garbage == [] and {entry.why for entry in found.recent} == {
        "no pair set was scored by its reference"
    }
    assert collect_garbage(cache) == [] and lonely in cache.references()
    age(root, 2 * 3600.0)
    assert len(find_unneeded(cache).garbage) == 2 and find_unneeded(cache).recent == []


def test_a_reference_under_which_a_run_is_at_work_stays_whatever_its_age(cache: Cache, root: Path) -> None:
    lonely = add_reference(cache, "b")
    with RunRecord(cache, lonely) as record:
        cache.scores(lonely).publish(
            [(key_of(number), value(number)) for number in range(3)], record.add_shard
        )
        assert collect_garbage(cache, grace_s=0) == []
    assert len(collect_garbage(cache, grace_s=0)) == 2
