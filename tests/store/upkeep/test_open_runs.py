"""compact and gc leave the shards that a failed audit withdraws, so that nothing of such a run remains."""

from pathlib import Path

import pytest

from dpo_cache.errors import CorruptShardError
from dpo_cache.store import Cache, open_cache
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.gc import collect_garbage, find_garbage
from dpo_cache.store.upkeep.open_runs import shards_of_runs
from dpo_cache.store.upkeep.run_record import RunRecord, end_killed_runs
from tests.store.conftest import key
from tests.store.upkeep.test_run_record import files, publish, records, reference_of


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Three shards of earlier runs."""
    cache = open_cache(tmp_path / "cache", create=True)
    with RunRecord(cache, reference_of(cache)) as record:
        for number in range(3):
            publish(cache, record, [number], *(["pairs"] if not number else []))
    return cache


def held(cache: Cache) -> set[str]:
    return shards_of_runs(cache.folder, reference_of(cache))


def numbers(cache: Cache, *among: int) -> list[int]:
    found = cache.scores(reference_of(cache)).contains([key(number) for number in among])
    return [number for number, is_there in zip(among, found, strict=True) if is_there]


def test_a_failed_run_is_withdrawn_whole_though_the_cache_was_compacted_meanwhile(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [10, 11])
        publish(cache, record, [12])
        done = compact_reference(cache, reference_of(cache))
        assert (done.shards_before, done.shards_after, done.completions, done.left) == (3, 1, 3, 2)
        assert numbers(cache, 0, 1, 2, 10, 11, 12) == [0, 1, 2, 10, 11, 12]
        assert record.fail() == (2, 0) and record.num_lost == 0
    assert numbers(cache, 0, 1, 2, 10, 11, 12) == [0, 1, 2] and not records(cache)


def test_gc_does_not_rewrite_them_either(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [10, 11])
        gone = collect_garbage(cache, scores=True, grace_s=0)
        assert len(gone) == 3 and numbers(cache, 0, 10, 11) == [10, 11]
        record.fail()
    assert numbers(cache, 10, 11) == []


def test_shards_of_a_run_that_was_killed_in_an_audit_wait_for_the_next_one(cache: Cache) -> None:
    killed = RunRecord(cache, reference_of(cache))  # not entered: as by another process, which is gone
    publish(cache, killed, [10])
    assert held(cache) == set(), "it was killed while it scored: its scores stay"
    killed.begin_audit()
    assert len(held(cache)) == 1 and compact_reference(cache, reference_of(cache)).left == 1
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [11])
        assert len(held(cache)) == 2
        record.begin_audit()
        record.end_audit()
    assert held(cache) == set() and compact_reference(cache, reference_of(cache)).left == 0
    assert numbers(cache, 0, 1, 2, 10, 11) == [0, 1, 2, 10, 11] and len(files(cache)) == 4


def test_what_is_being_withdrawn_is_left(cache: Cache) -> None:
    killed = RunRecord(cache, reference_of(cache))
    publish(cache, killed, [10])
    killed.fail()  # and is killed before it withdraws
    done = compact_reference(cache, reference_of(cache))
    assert (done.completions, done.left) == (3, 1)
    end_killed_runs(cache, reference_of(cache))
    assert numbers(cache, 0, 1, 2, 10) == [0, 1, 2]


def test_a_run_that_begins_to_publish_meanwhile_is_left(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of shards and the merge: its shard is not on the list."""
    from dpo_cache.store.upkeep import compact

    real = compact.shards_of_runs
    with RunRecord(cache, reference_of(cache)) as record:

        def publish_first(*given: object) -> set[str]:
            publish(cache, record, [10])
            return real(*given)  # type: ignore[arg-type]

        monkeypatch.setattr(compact, "shards_of_runs", publish_first)
        done = compact_reference(cache, reference_of(cache))
        assert (done.completions, done.left) == (3, 0)
        record.fail()
    assert numbers(cache, 0, 1, 2, 10) == [0, 1, 2]


def test_shards_that_an_older_version_merged_are_counted(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.store.upkeep.compact.shards_of_runs", lambda *_: set())
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [10])
        publish(cache, record, [11])
        compact_reference(cache, reference_of(cache))
        publish(cache, record, [12])
        record.fail()
        assert record.num_lost == 2
    assert numbers(cache, 10, 11, 12) == [10, 11], "the error says so"


def test_a_record_that_is_none_is_refused_before_anything_is_merged(cache: Cache) -> None:
    before = files(cache)
    name = f"references/{reference_of(cache)}/.run-{'0' * 16}.json"
    cache.folder.publish(name, b"{}")
    with pytest.raises(CorruptShardError):
        compact_reference(cache, reference_of(cache))
    assert {**files(cache), name: b""} == {**before, name: b""}


def test_shards_of_workers_wait_with_those_of_their_run_that_was_killed_in_an_audit(cache: Cache) -> None:
    """Their records do not show it."""
    killed = RunRecord(cache, reference_of(cache))
    for number in (10, 11):
        publish(cache, RunRecord(cache, reference_of(cache), run=killed.for_workers()), [number])
    assert held(cache) == set() and len(find_garbage(cache, grace_s=0)) == 3, "records of a run that is gone"
    publish(cache, killed, [12])
    killed.begin_audit()
    assert len(held(cache)) == 3 and find_garbage(cache, grace_s=0) == []
    done = compact_reference(cache, reference_of(cache))
    assert (done.completions, done.left) == (3, 3)
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [13])
        record.fail()
    assert numbers(cache, 0, 1, 2, 10, 11, 12, 13) == [0, 1, 2] and not records(cache)
