"""The record of a run: all of what it published is withdrawn, and nothing else, whenever it is interrupted."""

import os
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import CorruptShardError
from dpo_cache.store import Cache, open_cache
from dpo_cache.store.format.documents import read_sealed, seal_document
from dpo_cache.store.upkeep import run_record
from dpo_cache.store.upkeep.gc import collect_garbage
from dpo_cache.store.upkeep.open_runs import PATTERN, shards_of_runs
from dpo_cache.store.upkeep.run_record import RunRecord, end_killed_runs
from tests.store.conftest import make_pairs, make_scores

IDENTITY = {"weights": "w"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path / "cache", create=True)


def files(cache: Cache) -> dict[str, bytes]:
    return {
        path.relative_to(cache.folder.root).as_posix(): path.read_bytes()
        for path in Path(str(cache)).rglob("*")
        if path.is_file() and path.name != "format.json"
    }


def details(reference: str, name: str = "pairs", digest: str = "1") -> dict[str, Any]:
    return {
        "name": name,
        "split": "train",
        "reference": reference,
        "pairs_digest": digest * 64,
        "source": {"created": f"2026-01-0{digest}T00:00:00+00:00"},
    }


def publish(cache: Cache, record: RunRecord, keys: list[int], name: str = "", digest: str = "1") -> None:
    """What a run does: scores, and a pair set."""
    reference = cache.publish_reference(IDENTITY, {"model": "m"})
    cache.scores(reference).publish(make_scores(keys), record.add_shard)
    if name:
        writer = cache.write_pairs(name, "train")
        writer.add(make_pairs(3, first_row=int(digest)))
        record.add_pair_set(f"{name}/train", details(reference, name, digest))
        writer.finish(details(reference, name, digest))


def records(cache: Cache) -> list[str]:
    return [name for name in files(cache) if "/.run-" in name]


def reference_of(cache: Cache) -> str:
    from dpo_cache.store.format.documents import digest_json

    return digest_json(IDENTITY)


def test_a_run_that_ends_leaves_its_files_and_no_record(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [1, 2], "pairs")
        assert len(records(cache)) == 1
        assert end_killed_runs(cache, reference_of(cache)) == [] and len(records(cache)) == 1, "it is at work"
    assert records(cache) == [] and len(files(cache)) == 4


def test_a_run_that_publishes_nothing_writes_nothing(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        record.begin_audit()
        record.end_audit()
    assert not Path(str(cache)).exists()
    with RunRecord(cache, reference_of(cache)) as record:
        assert record.fail() == (0, 0)
    assert not Path(str(cache)).exists()


def test_a_failed_run_leaves_nothing(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [1, 2], "pairs")
        publish(cache, record, [3], "more", "2")
        assert record.fail() == (2, 2)
    assert files(cache) == {}


def test_files_of_other_runs_stay(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1, 2], "pairs", "1")
        publish(cache, earlier, [5], "kept", "4")
    before = files(cache)
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [1, 2])  # the same shard: it was there
        publish(cache, record, [3], "pairs", "2")  # replaces
        publish(cache, record, [4], "new", "3")
        with RunRecord(cache, reference_of(cache)) as other:
            publish(cache, other, [8])
        theirs = files(cache).keys() - before.keys() - {*records(cache)}
        assert record.fail() == (2, 2)
    left = files(cache)
    assert {name: left[name] for name in before} == before
    (more,) = left.keys() - before.keys()
    assert more in theirs and records(cache) == []


def test_a_pair_set_that_another_run_has_replaced_since_stays(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [1], "pairs", "1")
        with RunRecord(cache, reference_of(cache)) as other:
            publish(cache, other, [2], "pairs", "2")
        assert record.fail() == (1, 0)
    pairs = cache.pairs("pairs")
    assert pairs.manifest["pairs_digest"] == "2" * 64 and len(list(pairs)) == 3


def test_a_run_that_was_killed_while_it_withdrew_is_withdrawn_by_the_next(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1], "pairs", "1")
    before = files(cache)
    record = RunRecord(cache, reference_of(cache))  # not entered: as by another process, which is gone
    publish(cache, record, [2], "pairs", "2")
    record.fail()
    assert len(files(cache)) > len(before)
    (remark,) = end_killed_runs(cache, reference_of(cache))
    assert files(cache) == before
    assert "the 1 score files and 1 pair sets that it had published were withdrawn now" in remark
    assert end_killed_runs(cache, reference_of(cache)) == []


@pytest.mark.parametrize("outcome", ["fails", "agrees", "audits nothing"])
def test_files_of_a_run_that_was_killed_in_an_audit_depend_on_the_next_audit(
    cache: Cache, outcome: str
) -> None:
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1], "pairs", "1")
    before = files(cache)
    killed = RunRecord(cache, reference_of(cache))
    publish(cache, killed, [2], "pairs", "2")
    killed.begin_audit()
    kept = {name: content for name, content in files(cache).items() if "/.run-" not in name}
    assert end_killed_runs(cache, reference_of(cache)) == [] and len(records(cache)) == 1
    with RunRecord(cache, reference_of(cache)) as record:
        record.begin_audit()
        if outcome == "fails":
            assert record.fail() == (1, 1)
        elif outcome == "agrees":
            record.end_audit()
    if outcome == "fails":
        assert files(cache) == before
    else:
        assert {name: content for name, content in files(cache).items() if "/.run-" not in name} == kept
        assert len(records(cache)) == (outcome == "audits nothing")


def test_scores_of_a_run_that_was_killed_between_audits_stay(cache: Cache) -> None:
    record = RunRecord(cache, reference_of(cache))
    publish(cache, record, [2], "pairs", "2")
    record.begin_audit()
    record.end_audit()
    kept = {name: content for name, content in files(cache).items() if "/.run-" not in name}
    assert end_killed_runs(cache, reference_of(cache)) == [] and files(cache) == kept


@pytest.mark.parametrize(
    ("process", "ends"),
    [
        ({"pid": os.getppid(), "process_started": 0}, True),  # the number is another process's by now
        ({"pid": 2**22 + 5}, True),
        ({"host": "elsewhere"}, False),
    ],
)
def test_runs_that_may_be_at_work_are_left_alone(cache: Cache, process: dict[str, Any], ends: bool) -> None:
    record = RunRecord(cache, reference_of(cache))
    record._content |= process
    publish(cache, record, [2])
    assert end_killed_runs(cache, reference_of(cache)) == []
    assert bool(records(cache)) is not ends


def test_a_process_that_lives_is_at_work(cache: Cache) -> None:
    import psutil

    parent = psutil.Process(os.getppid())
    record = RunRecord(cache, reference_of(cache))
    record._content |= {"pid": parent.pid, "process_started": round(parent.create_time())}
    publish(cache, record, [2])
    assert end_killed_runs(cache, reference_of(cache)) == [] and records(cache)


def test_an_old_record_of_another_machine_is_a_killed_runs(cache: Cache) -> None:
    record = RunRecord(cache, reference_of(cache))
    record._content["host"] = "elsewhere"
    publish(cache, record, [2])
    (name,) = records(cache)
    os.utime(cache.folder.root / name, (0, 0))
    assert end_killed_runs(cache, reference_of(cache)) == [] and records(cache) == []


def test_a_withdrawal_is_finished_after_any_interruption(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before each call that changes the folder."""
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1], "pairs", "1")
    before = files(cache)
    for number in range(20):
        calls = []

        def counted(real: Any, calls: list[str] = calls, number: int = number) -> Any:
            def call(self: Any, *arguments: Any) -> Any:
                calls.append(arguments[0])
                if len(calls) == number + 1:
                    raise KeyboardInterrupt
                return real(self, *arguments)

            return call

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            with RunRecord(cache, reference_of(cache)) as record:
                publish(cache, record, [2], "pairs", "2")
                publish(cache, record, [3], "new", "3")
                record.fail()
                for name in ("remove", "publish"):
                    patch.setattr(type(cache.folder), name, counted(getattr(type(cache.folder), name)))
            raise KeyboardInterrupt  # none was left to interrupt
        assert caught.value
        end_killed_runs(cache, reference_of(cache))
        assert files(cache) == before, number
        if len(calls) <= number:
            break
    assert 5 < number < 19


def test_a_record_that_names_files_outside_is_refused(cache: Cache, tmp_path: Path) -> None:
    victim = tmp_path / "victim.parquet"
    victim.write_text("mine")
    record = RunRecord(cache, reference_of(cache))
    publish(cache, record, [2])
    (name,) = records(cache)
    content = read_sealed(cache.folder, name)
    for changes in (
        {"shards": ["../victim.parquet"]},
        {"state": "withdrawing", "files": ["../victim.parquet"], "manifests": {}},
        {"state": "withdrawing"},
        {"state": "other"},
        {"shards": None},
    ):
        cache.folder.publish(name, seal_document({**content, **changes}))
        with pytest.raises(
            CorruptShardError, match=r"\.run-.*: is not a record of a run.\n.*verify --repair"
        ):
            end_killed_runs(cache, reference_of(cache))
    assert victim.read_text() == "mine"


def test_readers_and_collectors_ignore_a_record(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [1, 2], "pairs")
        assert cache.references() == [reference_of(cache)] and cache.pair_sets() == ["pairs/train"]
        assert len(cache.scores(reference_of(cache))) == 2
        assert not any("/.run-" in name for name in cache.folder.files())
        collect_garbage(cache, grace_s=0)
        assert len(records(cache)) == 1
        assert PATTERN.fullmatch(records(cache)[0].rpartition("/")[2])


def test_in_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache("memory://run-record", create=True)
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [1], "pairs")
    kept = cache.folder.files()
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, record, [2], "more", "2")
        assert len(cache.folder.hidden_names(f"references/{reference_of(cache)}")) == 1
        record.fail()
    assert cache.folder.files() == kept and cache.folder.hidden() == {}
    record = RunRecord(cache, reference_of(cache))
    publish(cache, record, [2], "more", "2")
    record.fail()
    assert len(end_killed_runs(cache, reference_of(cache))) == 1
    assert cache.folder.files() == kept and cache.folder.hidden() == {}


# -- records of workers ----------------------------------------------------------------------------------


def worker_of(record: RunRecord) -> RunRecord:
    """The record of a worker of this run, in another process."""
    return RunRecord(record.cache, reference_of(record.cache), run=record.for_workers())


def as_of_a_dead_process(record: RunRecord) -> None:
    record._content["pid"] = 2**22 + 5


def without_records(cache: Cache) -> dict[str, bytes]:
    return {name: content for name, content in files(cache).items() if "/.run-" not in name}


def test_records_of_workers_end_with_the_runs_own(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        workers = [worker_of(record) for _ in range(3)]
        for number, worker in enumerate(workers):
            publish(cache, worker, [number])
        assert len(records(cache)) == 4
        assert end_killed_runs(cache, reference_of(cache)) == [] and len(records(cache)) == 4
        kept = without_records(cache)
        assert len(cache.scores(reference_of(cache))) == 3
    assert records(cache) == [] and files(cache) == kept


def test_a_worker_finds_the_runs_record_before_anything_is_published(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        assert cache.folder.exists(record.for_workers()["record"])
    assert files(cache) == {}


def test_a_failed_run_leaves_nothing_of_its_workers(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1], "pairs", "1")
    before = files(cache)
    with RunRecord(cache, reference_of(cache)) as other:
        other_worker = worker_of(other)
        publish(cache, other_worker, [7])
        theirs = without_records(cache)
        with RunRecord(cache, reference_of(cache)) as record:
            for number in (2, 3):
                publish(cache, worker_of(record), [number])
            failing = worker_of(record)
            publish(cache, failing, [4])
            failing.fail()
            publish(cache, record, [5], "new", "2")
            assert record.fail() == (4, 1)
        assert without_records(cache) == theirs, "files of another run and of its workers stay"
    assert files(cache) == theirs and theirs.keys() > before.keys()


def test_a_run_whose_first_worker_made_the_entry_of_the_reference_removes_it(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, worker_of(record), [1])
        publish(cache, worker_of(record), [2])
        assert record.fail() == (2, 0)
    assert files(cache) == {}


def killed_driver(cache: Cache) -> list[RunRecord]:
    """The records of two workers, each with a shard, of a driver that was killed after another run."""
    driver = RunRecord(cache, reference_of(cache))
    as_of_a_dead_process(driver)
    workers = [worker_of(driver) for _ in range(2)]
    for number, worker in enumerate(workers, 2):
        publish(cache, worker, [number])
    return workers


def test_workers_of_a_driver_that_was_killed_while_it_withdrew_are_withdrawn_by_the_next(
    cache: Cache,
) -> None:
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1], "pairs", "1")
    before = files(cache)
    workers = killed_driver(cache)
    workers[0].fail()  # and the driver did not come to `fail`
    (remark,) = end_killed_runs(cache, reference_of(cache))
    assert "the 2 score files and 0 pair sets that it had published were withdrawn now" in remark
    assert files(cache) == before


def test_scores_of_workers_of_a_driver_that_was_killed_stay(cache: Cache) -> None:
    driver = RunRecord(cache, reference_of(cache))
    as_of_a_dead_process(driver)
    publish(cache, worker_of(driver), [1])
    publish(cache, worker_of(driver), [2])
    kept = without_records(cache)
    assert end_killed_runs(cache, reference_of(cache)) == [] and files(cache) == kept


@pytest.mark.parametrize("outcome", ["fails", "agrees"])
def test_what_a_killed_run_published_depends_on_the_next_audit_if_a_worker_was_auditing(
    cache: Cache, outcome: str
) -> None:
    with RunRecord(cache, reference_of(cache)) as earlier:
        publish(cache, earlier, [1], "pairs", "1")
    before = files(cache)
    workers = killed_driver(cache)
    workers[0].begin_audit()
    kept = without_records(cache)
    assert end_killed_runs(cache, reference_of(cache)) == [] and len(records(cache)) == 3
    with RunRecord(cache, reference_of(cache)) as record:
        record.begin_audit()
        if outcome == "fails":
            assert record.fail() == (2, 0)
        else:
            record.end_audit()
    assert files(cache) == (before if outcome == "fails" else kept)


def test_shards_of_workers_are_left_as_they_are_while_the_run_is_at_work(cache: Cache) -> None:
    with RunRecord(cache, reference_of(cache)) as record:
        publish(cache, worker_of(record), [1])
        assert len(shards_of_runs(cache.folder, reference_of(cache))) == 1
    assert shards_of_runs(cache.folder, reference_of(cache)) == set()


def test_a_long_runs_record_is_rewritten_before_other_machines_take_it_for_a_killed_runs(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(run_record.time, "monotonic", lambda: now[0])
    with RunRecord(cache, reference_of(cache)) as record:
        name = record.for_workers()["record"]
        for minutes, is_renewed in ((5, False), (11, True)):
            cache.folder.remove(name)  # another machine took it for a killed run's
            now[0] += 60 * minutes
            record.renew()
            assert cache.folder.exists(name) is is_renewed
            if not is_renewed:
                record._write("scoring")
