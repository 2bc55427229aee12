"""compact, gc and rm: what goes, what stays, and what others at work notice of it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dpo_cache.errors import CacheError, CorruptShardError, NotInCacheError, StorageError
from dpo_cache.store import Cache, ScoreIndex, open_cache
from dpo_cache.store.format.keys import is_sorted
from dpo_cache.store.upkeep import compact as upkeep_module
from dpo_cache.store.upkeep import gc as gc_module
from dpo_cache.store.upkeep import merge_shards as merging_module
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.gc import Garbage, collect_garbage, find_garbage
from dpo_cache.store.upkeep.remove import plan_removal, remove_files
from dpo_cache.store.upkeep.repair import repair_cache
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_pairs, add_reference, add_scores, contents, key_of, make_cache, value
from tests.store.conftest import flip_file

SHARDS = [range(start, start + 5) for start in range(0, 40, 5)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return make_cache(tmp_path / "cache", shards=SHARDS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def reference_of(cache: Cache) -> str:
    return cache.references()[0]


def values(cache: Cache, numbers: object) -> list[list[float]]:
    return [
        score.token_logps.tolist()
        for score in cache.scores(reference_of(cache)).fetch([key_of(number) for number in numbers])
    ]  # type: ignore[attr-defined]


def shard_names(cache: Cache) -> list[str]:
    return cache.folder.names(f"references/{reference_of(cache)}/scores")


# -- compact -------------------------------------------------------------------------------------------


def test_compact_leaves_the_same_values_in_fewer_sorted_shards(cache: Cache, root: Path) -> None:
    before = values(cache, range(40))
    done = compact_reference(cache, reference_of(cache))
    assert (done.shards_before, done.shards_after, done.completions, done.duplicates) == (8, 1, 40, 0)
    assert values(cache, range(40)) == before
    (name,) = shard_names(cache)
    assert is_sorted(upkeep_module.keys_in(cache.folder, f"references/{reference_of(cache)}/scores", name))
    assert verify_cache(root).is_whole


def test_a_second_compact_does_nothing(cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging_module, "SHARD_BYTES", 600)
    monkeypatch.setattr(upkeep_module, "SHARD_BYTES", 600)
    monkeypatch.setattr("dpo_cache.store.format.shards.ROW_GROUP_BYTES", 200)
    monkeypatch.setattr(
        upkeep_module,
        "write_sorted_shards",
        lambda *given: merging_module.write_sorted_shards(*given, shard_bytes=600),
    )
    assert compact_reference(cache, reference_of(cache)).shards_after > 1
    before = contents(root)
    monkeypatch.setattr(upkeep_module, "merge_shards", lambda *_: pytest.fail("it merged again"))
    done = compact_reference(cache, reference_of(cache))
    assert done.shards_before == done.shards_after and contents(root) == before


def test_what_came_later_is_compacted_with_the_rest(cache: Cache) -> None:
    compact_reference(cache, reference_of(cache))
    add_scores(cache, reference_of(cache), range(40, 50))
    done = compact_reference(cache, reference_of(cache))
    assert (done.shards_before, done.shards_after, done.completions) == (2, 1, 50)


def test_duplicates_are_dropped_and_counted(cache: Cache) -> None:
    add_scores(cache, reference_of(cache), range(3, 9), shift=1e-4)
    done = compact_reference(cache, reference_of(cache))
    assert (done.completions, done.duplicates) == (40, 6)


def test_duplicates_that_disagree_stop_it_with_nothing_changed(cache: Cache, root: Path) -> None:
    add_scores(cache, reference_of(cache), [4], shift=0.5)
    before = contents(root)
    with pytest.raises(
        CorruptShardError,
        match=r"by up to 0\.5 nats a token \(allowed 0\.001\)\.\nNothing was changed\. Run `dpo-cache verify",
    ):
        compact_reference(cache, reference_of(cache))
    assert contents(root) == before


def test_a_damaged_shard_stops_it_with_nothing_lost(cache: Cache, root: Path) -> None:
    shard = sorted(root.rglob("scores/*.parquet"))[3]
    flip_file(shard, shard.stat().st_size // 3)
    before = contents(root)
    with pytest.raises(CorruptShardError):
        compact_reference(cache, reference_of(cache))
    assert before.items() <= contents(root).items()


@pytest.mark.parametrize("step", range(10))
def test_a_crash_at_any_step_loses_nothing_and_the_next_run_ends_it(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    expected, taken = values(cache, range(40)), 0

    def crash_at(name: str) -> None:
        real = getattr(cache.folder, name)

        def watched(*given: object) -> object:
            nonlocal taken
            taken += 1
            if taken > step:
                raise StorageError("the power went")
            return real(*given)

        monkeypatch.setattr(cache.folder, name, watched)

    crash_at("publish")
    crash_at("remove")
    if step < 9:  # one shard published, eight removed
        with pytest.raises(StorageError):
            compact_reference(cache, reference_of(cache))
    monkeypatch.undo()
    again = Cache(root)
    assert values(again, range(40)) == expected and verify_cache(root).is_whole
    compact_reference(again, reference_of(again))
    assert values(again, range(40)) == expected and len(shard_names(again)) == 1


def test_a_reader_that_opened_before_finds_its_scores_afterwards(cache: Cache) -> None:
    index = cache.scores(reference_of(cache))
    compact_reference(cache, reference_of(cache))
    found = index.fetch([key_of(number) for number in range(40)])
    assert [score.token_logps.tolist() for score in found] == [
        value(number).token_logps.tolist() for number in range(40)
    ]


def test_a_shard_published_meanwhile_stays(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    real = upkeep_module.merge_shards

    def merge_while_another_writes(*given: object) -> object:
        add_scores(Cache(cache.folder.root), reference_of(cache), range(40, 45))  # type: ignore[union-attr]
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(upkeep_module, "merge_shards", merge_while_another_writes)
    compact_reference(cache, reference_of(cache))
    assert len(values(cache, range(45))) == 45


def test_two_that_compact_at_once_lose_nothing(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lists the shards before the first removes them, and merges after it has."""
    expected = values(cache, range(40))
    spare = root.with_name("spare")
    shutil.copytree(root, spare)
    real = upkeep_module.write_sorted_shards

    def publish_then_let_the_other_run(*given: object) -> list[str]:
        names = list(real(*given))  # type: ignore[arg-type]
        monkeypatch.setattr(upkeep_module, "write_sorted_shards", real)
        compact_reference(Cache(root), reference_of(cache))
        return names

    monkeypatch.setattr(upkeep_module, "write_sorted_shards", publish_then_let_the_other_run)
    compact_reference(cache, reference_of(cache))
    assert values(Cache(root), range(40)) == expected


def test_an_empty_reference_is_compact(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    reference = add_reference(cache)
    done = compact_reference(cache, reference)
    assert (done.shards_before, done.shards_after, done.completions) == (0, 0, 0)


# -- gc ------------------------------------------------------------------------------------------------


def age(root: Path, seconds: float = 7200.0) -> None:
    """Everything was written two hours ago."""
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


def test_scores_that_no_pair_set_holds_go_only_where_that_is_asked_for(cache: Cache, root: Path) -> None:
    age(root)
    assert find_garbage(cache) == []
    found = find_garbage(cache, scores=True)
    assert (
        len(found) == 8 and sum(entry.unused_rows is not None for entry in found) == 1
    )  # 0 to 3 of the first shard are used
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
        "scratch of a writer that was killed",
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


# -- rm ------------------------------------------------------------------------------------------------


def test_a_pair_set_is_removed_whole_and_alone(cache: Cache, root: Path) -> None:
    add_pairs(cache, reference_of(cache), [(4, 5)], name="other")
    removal = plan_removal(cache, "pairs", "demo")
    assert removal.pair_sets == ["demo/train"] and len(removal.files) == 2
    remove_files(cache, list(removal.files))
    assert (
        cache.pair_sets() == ["other/train"]
        and not (root / "pairs/demo").exists()
        and verify_cache(root).is_whole
    )


def test_a_reference_with_pair_sets_is_refused_and_they_are_listed(cache: Cache, root: Path) -> None:
    reference = reference_of(cache)
    with pytest.raises(
        CacheError, match=rf"reference {reference[:12]} has pair sets: demo/train\.\n.*`with_pairs`"
    ):
        plan_removal(cache, "reference", reference[:6])
    removal = plan_removal(cache, "reference", reference[:6], with_pairs=True)
    remove_files(cache, list(removal.files))
    assert list(contents(root)) == ["format.json"]


def test_what_is_not_there_is_said_so(cache: Cache) -> None:
    with pytest.raises(NotInCacheError, match="no pair set 'nothing'"):
        plan_removal(cache, "pairs", "nothing")
    with pytest.raises(NotInCacheError, match="no reference whose id starts with 'zz'"):
        plan_removal(cache, "reference", "zz")


def test_a_removal_cut_off_anywhere_leaves_a_valid_cache(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = plan_removal(cache, "reference", reference_of(cache), with_pairs=True).files
    spare, remove = root.with_name("spare"), cache.folder.remove
    shutil.copytree(root, spare)
    for length in range(len(files)):
        shutil.rmtree(root)
        shutil.copytree(spare, root)
        left = iter(range(length))

        def remove_or_die(name: str, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            remove(name)

        monkeypatch.setattr(cache.folder, "remove", remove_or_die)
        with pytest.raises(KeyboardInterrupt):
            remove_files(cache, sorted(files, reverse=True))
        assert verify_cache(root).is_whole and len(contents(root)) == len(contents(spare)) - length


def test_the_index_of_a_reference_that_is_gone_says_what_it_misses(cache: Cache) -> None:
    index: ScoreIndex = cache.scores(reference_of(cache))
    remove_files(cache, list(plan_removal(cache, "reference", reference_of(cache), with_pairs=True).files))
    with pytest.raises(StorageError, match="cannot read"):
        index.fetch([key_of(0)])
    assert np.array_equal(index.contains([key_of(0)]), [False])
