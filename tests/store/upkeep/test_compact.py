"""compact: the same values in fewer shards, and what others at work notice of it."""

import shutil
from pathlib import Path

import pytest

from dpo_cache.errors import CorruptShardError, StorageError
from dpo_cache.store import Cache, open_cache
from dpo_cache.store.format.keys import is_sorted
from dpo_cache.store.format.shards import read_keys
from dpo_cache.store.upkeep import compact as compact_module
from dpo_cache.store.upkeep import merge_shards as merging_module
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_reference, add_scores, contents, key_of, value
from tests.store.conftest import flip_file
from tests.store.upkeep.conftest import reference_of, values


def shard_names(cache: Cache) -> list[str]:
    return cache.folder.names(f"references/{reference_of(cache)}/scores")


def test_compact_leaves_the_same_values_in_fewer_sorted_shards(cache: Cache, root: Path) -> None:
    before = values(cache, range(40))
    done = compact_reference(cache, reference_of(cache))
    assert (done.shards_before, done.shards_after, done.completions, done.duplicates) == (8, 1, 40, 0)
    assert values(cache, range(40)) == before
    (name,) = shard_names(cache)
    (keys,) = read_keys(cache.folder, f"references/{reference_of(cache)}/scores/{name}")
    assert is_sorted(keys)
    assert verify_cache(root).is_whole


def test_a_second_compact_does_nothing(cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging_module, "SHARD_BYTES", 600)
    monkeypatch.setattr(compact_module, "SHARD_BYTES", 600)
    monkeypatch.setattr("dpo_cache.store.format.shards.ROW_GROUP_BYTES", 200)
    monkeypatch.setattr(
        compact_module,
        "write_sorted_shards",
        lambda *given: merging_module.write_sorted_shards(*given, shard_bytes=600),
    )
    assert compact_reference(cache, reference_of(cache)).shards_after > 1
    before = contents(root)
    monkeypatch.setattr(compact_module, "merge_shards", lambda *_: pytest.fail("it merged again"))
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


@pytest.mark.rotating(3)
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
    real = compact_module.merge_shards

    def merge_while_another_writes(*given: object) -> object:
        add_scores(Cache(cache.folder.root), reference_of(cache), range(40, 45))  # type: ignore[union-attr]
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(compact_module, "merge_shards", merge_while_another_writes)
    compact_reference(cache, reference_of(cache))
    assert len(values(cache, range(45))) == 45


def test_two_that_compact_at_once_lose_nothing(
    cache: Cache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second lists the shards before the first removes them, and merges after it has."""
    expected = values(cache, range(40))
    spare = root.with_name("spare")
    shutil.copytree(root, spare)
    real = compact_module.write_sorted_shards

    def publish_then_let_the_other_run(*given: object) -> list[str]:
        names = list(real(*given))  # type: ignore[arg-type]
        monkeypatch.setattr(compact_module, "write_sorted_shards", real)
        compact_reference(Cache(root), reference_of(cache))
        return names

    monkeypatch.setattr(compact_module, "write_sorted_shards", publish_then_let_the_other_run)
    compact_reference(cache, reference_of(cache))
    assert values(Cache(root), range(40)) == expected


def test_an_empty_reference_is_compact(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    reference = add_reference(cache)
    done = compact_reference(cache, reference)
    assert (done.shards_before, done.shards_after, done.completions) == (0, 0, 0)
