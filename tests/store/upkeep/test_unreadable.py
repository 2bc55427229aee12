"""What cannot be read is no damage: `verify` reports it, `repair` leaves it, and the others read around it."""

import errno
import os
from pathlib import Path

import fsspec
import pytest

from dpo_cache.errors import CacheError, StorageError
from dpo_cache.store import Cache
from dpo_cache.store.folders import retries
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.contents import read_contents
from dpo_cache.store.upkeep.gc import collect_garbage, find_garbage
from dpo_cache.store.upkeep.repair import Left, repair_cache
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_pairs, add_reference, add_scores, contents, key_of, make_cache, value
from tests.store.conftest import flip, flip_file
from tests.store.refusing_disk import REMOVING, refuse

FILES = ["format.json", "reference.json", "scores/*.parquet", "manifest.json", "train/*.parquet"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def the_file(root: Path, pattern: str) -> Path:
    return min(root.rglob(pattern))


def name_of(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("pattern", FILES)
def test_a_file_that_cannot_be_read_is_reported_and_left(
    root: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, number: int
) -> None:
    path, before = the_file(root, pattern), contents(root)
    refuse(monkeypatch, number, lambda file: file == path)
    report = verify_cache(root)
    assert [(problem.file, problem.kind) for problem in report.problems] == [
        (name_of(root, path), "unreadable")
    ]
    assert os.strerror(number) in report.problems[0].found and not report.is_whole
    repaired = repair_cache(root, report)
    assert (repaired.moved, repaired.left, repaired.commands) == ([], [], [])
    assert contents(root) == before


def test_damage_elsewhere_is_moved_all_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, damaged = sorted(root.rglob("scores/*.parquet"))
    flip_file(damaged, 60)
    refuse(monkeypatch, errno.EIO, lambda file: file == healthy)
    report = verify_cache(root)
    assert {problem.file: problem.kind for problem in report.problems} == {
        name_of(root, healthy): "unreadable",
        name_of(root, damaged): "damaged",
    }
    (moved,) = repair_cache(root, report).moved
    assert moved.file == name_of(root, damaged) and healthy.exists()


def test_a_store_that_answers_503_to_the_end_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAITS_S", ())
    memory = fsspec.filesystem("memory")
    cache = make_cache("memory://unreadable-test")
    try:
        shard = min(name for name in cache.folder.files() if "/scores/" in name)
        real = type(memory).cat_file

        def fail(self: object, path: str, *arguments: object, **options: object) -> bytes:
            if shard in path:
                raise TimeoutError("503 Service Unavailable")
            return real(self, path, *arguments, **options)

        monkeypatch.setattr(type(memory), "cat_file", fail)
        report = verify_cache("memory://unreadable-test")
        assert [(problem.file, problem.kind) for problem in report.problems] == [(shard, "unreadable")]
        assert repair_cache("memory://unreadable-test", report).moved == []
        assert cache.folder.exists(shard)
    finally:
        memory.rm("/unreadable-test", recursive=True)


# a check of a document reads it twice
@pytest.mark.parametrize(
    ("pattern", "bad_reads"), [("reference.json", 2), ("scores/*.parquet", 1), ("train/*.parquet", 1)]
)
@pytest.mark.parametrize("is_lasting", [False, True])
def test_bytes_that_are_read_differently_each_time_are_no_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, bad_reads: int, is_lasting: bool
) -> None:
    path, real, reads = the_file(root, pattern), Disk.read, []

    def read_badly(self: Disk, file: Path) -> bytes:
        if file != path:
            return real(self, file)
        reads.append(file)
        is_bad = is_lasting or len(reads) <= bad_reads
        return flip(real(self, file), 40 + len(reads)) if is_bad else real(self, file)

    monkeypatch.setattr(Disk, "read", read_badly)
    report = verify_cache(root)
    assert [(problem.file, problem.kind) for problem in report.problems] == [
        (name_of(root, path), "unreadable")
    ]
    assert "other bytes each time it is read" in report.problems[0].found
    assert repair_cache(root, report).moved == [] and path.exists()


def test_a_file_that_is_published_again_before_the_repair_stays(root: Path) -> None:
    path = the_file(root, "train/*.parquet")
    whole = path.read_bytes()
    flip_file(path, 300)
    report = verify_cache(root)
    path.write_bytes(whole)
    repaired = repair_cache(root, report)
    name = name_of(root, path)
    assert repaired.moved == [] and repaired.left == [
        Left(name, "its bytes have changed since: verify again")
    ]
    assert verify_cache(root).is_whole


def test_a_file_that_is_published_again_in_the_midst_of_the_repair_is_put_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = the_file(root, "train/*.parquet")
    whole = path.read_bytes()
    flip_file(path, 300)
    report, real = verify_cache(root), LocalFolder.move

    def move(self: LocalFolder, name: str, to: str) -> bool:
        if to.startswith(".quarantine"):
            path.write_bytes(whole)
        return real(self, name, to)

    monkeypatch.setattr(LocalFolder, "move", move)
    assert repair_cache(root, report).moved == [] and verify_cache(root).is_whole


def test_a_bad_file_of_another_user_is_left_and_the_rest_is_moved(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = sorted(root.rglob("scores/*.parquet"))
    for path in (theirs, ours):
        flip_file(path, 60)
    refuse(monkeypatch, errno.EPERM, lambda file: file == theirs, REMOVING)
    repaired = repair_cache(root, verify_cache(root))
    assert [moved.file for moved in repaired.moved] == [name_of(root, ours)]
    (left,) = repaired.left
    assert left.file == name_of(root, theirs) and "Operation not permitted" in left.why


def test_a_pipe_in_the_place_of_a_file_is_removed(root: Path) -> None:
    path = the_file(root, "scores/*.parquet")
    path.unlink()
    os.mkfifo(path)
    report = verify_cache(root)
    (problem,) = report.problems
    assert problem.kind == "damaged" and "found a pipe" in problem.found
    repaired = repair_cache(root, report)
    assert [moved.to for moved in repaired.moved] == [None] and verify_cache(root).is_whole


@pytest.mark.parametrize("pattern", FILES[1:])
def test_a_file_larger_than_any_is_moved_without_being_read(root: Path, pattern: str) -> None:
    path = the_file(root, pattern)
    os.truncate(path, 2**40)  # takes no room on the disk
    report = verify_cache(root)
    assert {problem.file: problem.kind for problem in report.problems}[name_of(root, path)] == "damaged"
    (moved,) = repair_cache(root, report).moved
    assert moved.file == name_of(root, path) and (root / str(moved.to)).stat().st_size == 2**40


def test_a_folder_that_may_not_be_listed_is_reported_and_named_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(root)
    add_pairs(cache, cache.references()[0], [(0, 1)], name="closed")
    closed = root / "pairs/closed"
    refuse(monkeypatch, errno.EACCES, lambda path: path == closed, ("entries",))
    monkeypatch.setattr(LocalFolder, "closed_folders", lambda self: ["pairs/closed"])
    report = verify_cache(root)
    assert [(problem.file, problem.kind) for problem in report.problems] == [("pairs/closed", "unreadable")]
    assert report.pair_sets == 1 and caplog.text.count("is left out: it cannot be listed") == 1
    assert repair_cache(root, report).moved == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_folders_that_may_not_be_listed_are_found(root: Path) -> None:
    (root / "pairs/demo").chmod(0)
    try:
        assert LocalFolder(root).closed_folders() == ["pairs/demo"]
    finally:
        (root / "pairs/demo").chmod(0o755)


# -- gc and compact ----------------------------------------------------------------------------------------


def test_gc_keeps_all_that_a_manifest_may_need_which_it_cannot_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(root)
    (reference,) = cache.references()
    lonely = add_reference(cache, "b")
    add_scores(cache, lonely, range(3))
    add_pairs(cache, reference, [(2, 3)])  # the parts that the first manifest named are leftovers
    assert len(find_garbage(cache, grace_s=0)) == 3
    manifest = root / "pairs/demo/train/manifest.json"
    refuse(monkeypatch, errno.EACCES, lambda path: path == manifest)
    assert find_garbage(Cache(root), grace_s=0, scores=True) == []
    assert "the manifests of 1 pair sets or folders cannot be read, such as pairs/demo/train" in caplog.text


def test_gc_of_scores_leaves_shards_that_it_cannot_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(root)
    theirs = {*root.rglob("scores/*.parquet")}
    add_scores(cache, cache.references()[0], range(20, 25))
    refuse(monkeypatch, errno.EACCES, lambda path: path in theirs)
    (entry,) = collect_garbage(Cache(root), grace_s=0, scores=True)
    assert entry.why == "no pair set holds its 5 completions" and all(path.exists() for path in theirs)


def test_compact_leaves_what_it_may_not_read_or_not_remove(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(root)
    (reference,) = cache.references()
    for first in (10, 20):
        add_scores(cache, reference, range(first, first + 5))
    closed, *_ = sorted(root.rglob("scores/*.parquet"))
    refuse(monkeypatch, errno.EACCES, lambda path: path == closed)
    done = compact_reference(Cache(root), reference)
    assert (done.shards_before, done.shards_after) == (3, 1) and closed.exists()
    assert f"{closed} is not compacted: cannot read" in caplog.text
    monkeypatch.undo()
    (merged,) = {*root.rglob("scores/*.parquet")} - {closed}
    refuse(monkeypatch, errno.EPERM, lambda path: path == merged, REMOVING)
    compact_reference(Cache(root), reference)
    assert merged.exists() and not closed.exists() and "files of other users stay" in caplog.text
    assert len(Cache(root).scores(reference)) == 15 and verify_cache(root).is_whole


# -- the index ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, None], ids=["closed", "bad sector", "damaged"])
def test_one_shard_that_cannot_be_read_does_not_stop_who_needs_the_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int | None
) -> None:
    (reference,) = Cache(root).references()
    (shard,) = (
        path for path in root.rglob("scores/*.parquet") if path.stat().st_size == min_size(root, "scores/*")
    )
    if number is None:
        shard.write_bytes(shard.read_bytes()[:-30])
    else:
        refuse(monkeypatch, number, lambda file: file == shard)
    index = Cache(root).scores(reference)
    assert index.contains([key_of(number) for number in range(5)]).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert len(index.fetch([key_of(2), key_of(4)])) == 2
    assert caplog.text.count("a score shard is left out") == 1 and shard.name in caplog.text
    with pytest.raises(CacheError, match=shard.name):
        index.fetch([key_of(0)])
    add_scores(Cache(root), reference, [0, 1, 9])
    index.refresh()
    assert index.contains([key_of(0), key_of(1), key_of(9)]).all() and len(index.fetch([key_of(0)])) == 1


def min_size(root: Path, pattern: str) -> int:
    return min(path.stat().st_size for path in root.rglob(pattern))


def test_a_shard_that_fails_when_it_is_read_gives_way_to_another_with_its_completions(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (reference,) = Cache(root).references()
    index, first = Cache(root).scores(reference), {*root.rglob("scores/*.parquet")}
    add_scores(Cache(root), reference, range(6))
    index.refresh()
    for shard in first:
        flip_file(shard, shard.stat().st_size // 2)
    found = index.fetch([key_of(number) for number in range(6)])
    assert [score.token_logps.tolist() for score in found] == [
        value(number).token_logps.tolist() for number in range(6)
    ]
    assert caplog.text.count("is left out") == 2


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE, errno.ENODEV])
def test_a_disk_that_is_gone_is_not_taken_for_unreadable_shards(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (reference,) = Cache(root).references()
    refuse(monkeypatch, number, lambda file: file.parent.name == "scores")
    with pytest.raises(StorageError, match=os.strerror(number)):
        Cache(root).scores(reference)


def test_a_disk_that_reads_no_shard_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (reference,) = Cache(root).references()
    refuse(monkeypatch, errno.EIO, lambda file: file.parent.name == "scores")
    with pytest.raises(StorageError, match="Input/output error"):
        Cache(root).scores(reference)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("pattern", FILES)
def test_a_listing_tells_it_from_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, number: int
) -> None:
    path = the_file(root, pattern)
    refuse(monkeypatch, number, lambda file: file == path)
    found = read_contents(root)
    entries = [found, *found.references, *found.pair_sets]
    unreadable = [problem for entry in entries for problem in entry.unreadable]
    assert len(unreadable) == 1 and os.strerror(number) in unreadable[0] and str(path) in unreadable[0]
    assert not any(name_of(root, path) in problem for entry in entries for problem in entry.damage)
