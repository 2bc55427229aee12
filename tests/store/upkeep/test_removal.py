"""Removing while others write: at whatever step, no pair set is left without a file that its manifest names."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dpo_cache.errors import CorruptShardError, StorageError
from dpo_cache.store import Cache
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.folders.folder import open_folder
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.upkeep.gc import collect_garbage, find_garbage
from dpo_cache.store.upkeep.removal import (
    hidden_name,
    name_before_hiding,
    put_back_needed,
    remove_unneeded,
)
from dpo_cache.store.upkeep.remove import plan_removal, remove_files
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_pairs, add_reference, add_scores, contents, identity, make_cache
from tests.store.conftest import flip_file
from tests.store.refusing_disk import REMOVING, refuse

PAIRS = [(0, 1), (2, 3)]
STEPS = ("create", "rename", "unlink", "status", "read", "open", "names", "entries")


def make_leftovers(root: Path) -> Cache:
    """A cache with the parts of a pair set and the reference that it needs, and no manifest."""
    cache = make_cache(root)
    lonely = add_reference(cache, "b")
    add_scores(cache, lonely, range(4))
    add_pairs(cache, lonely, PAIRS, name="made")
    (root / "pairs/made/train/manifest.json").unlink()
    return cache


def write(root: Path) -> None:
    """As `precompute` publishes a pair set."""
    cache = Cache(root)
    provenance = {"model": "example/tiny", "revision": None, "device": "cpu"}
    lonely = cache.publish_reference(identity("b"), provenance)
    add_pairs(cache, lonely, PAIRS, name="made")
    cache.publish_reference(identity("b"), provenance)


def collect(root: Path) -> None:
    collect_garbage(Cache(root), grace_s=0)


def remove(root: Path) -> None:
    cache = Cache(root)
    if "made/train" in cache.pair_sets():
        remove_files(cache, list(plan_removal(cache, "pairs", "made").files))


@contextmanager
def interrupted(at: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Before the step of this number that anything takes on a disk, `act` is done; counted are the steps."""
    taken: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(step: str) -> None:
            real = getattr(Disk, step)

            def watched(self: Disk, *arguments: object) -> object:
                taken.append(step)
                if len(taken) == at:
                    patch.undo()
                    act()
                return real(self, *arguments)

            patch.setattr(Disk, step, watched)

        for step in STEPS:
            watch(step)
        patch.setattr(Disk, "sync_file", lambda self, descriptor: None)
        patch.setattr(Disk, "sync_folder", lambda self, path: None)
        yield taken


def check_every_step(
    tmp_path: Path, first: Callable[[Path], None], second: Callable[[Path], None], stride: int
) -> int:
    """Do the second in the midst of the first, at every `stride`-th step; returns the number of places."""
    make_leftovers(tmp_path / "start")
    at = 1
    while True:
        root = tmp_path / "cache"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "start", root)
        with interrupted(at, lambda root=root: second(root)) as taken:
            first(root)
        if len(taken) < at:
            return at
        cache = Cache(root)
        for name in cache.pair_sets():
            assert cache.pairs(name).is_complete(), (at, name)
            assert cache.pairs(name).reference_id in cache.references(), (at, name)
        assert "made/train" in cache.pair_sets(), at
        at += stride


def test_gc_in_the_midst_of_a_writer_leaves_its_pair_set_whole(tmp_path: Path) -> None:
    assert check_every_step(tmp_path, write, collect, stride=3) > 20


def test_a_writer_in_the_midst_of_gc_leaves_its_pair_set_whole(tmp_path: Path) -> None:
    assert check_every_step(tmp_path, collect, write, stride=7) > 20


@pytest.mark.slow
def test_gc_and_a_writer_at_every_step_of_each_other(tmp_path: Path) -> None:
    assert check_every_step(tmp_path / "1", write, collect, stride=1) > 20
    assert check_every_step(tmp_path / "2", collect, write, stride=1) > 20


def test_a_writer_in_the_midst_of_rm_leaves_all_of_its_pair_set_or_none(tmp_path: Path) -> None:
    make_leftovers(tmp_path / "start")
    write(tmp_path / "start")
    outcomes = set()
    for at in range(1, 10_000, 4):
        root = tmp_path / "cache"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "start", root)
        with interrupted(at, lambda root=root: write(root)) as taken:
            remove(root)
        if len(taken) < at:
            break
        is_there = "made/train" in Cache(root).pair_sets()
        outcomes.add(is_there)
        assert not is_there or Cache(root).pairs("made").is_complete()
    assert outcomes == {True, False}


def test_a_removal_that_was_killed_is_ended_by_the_next_gc(tmp_path: Path) -> None:
    """Killed before each of its steps; then either the writer comes first, or gc."""
    make_leftovers(tmp_path / "start")

    def kill() -> None:
        raise KeyboardInterrupt

    for at in range(3, 10_000, 11):
        root = tmp_path / "cache"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "start", root)
        with pytest.MonkeyPatch.context() as patch, interrupted(at, kill) as taken:
            # a process that is killed puts nothing back
            patch.setattr("dpo_cache.store.upkeep.removal._put_back", lambda *_: None)
            with suppress(KeyboardInterrupt):
                collect(root)
        if len(taken) < at:
            break
        assert verify_cache(root).is_whole
        if at % 2:
            write(root)
        collect(root)
        assert Cache(root).folder.hidden() == {} and verify_cache(root).is_whole
        assert ("made/train" in Cache(root).pair_sets()) == bool(at % 2)


def test_a_hidden_file_is_put_back_only_if_a_manifest_needs_it(tmp_path: Path) -> None:
    cache = make_leftovers(tmp_path / "cache")
    needed = f"pairs/demo/train/{cache.pairs('demo').manifest['parts'][0]['file']}"
    (unneeded,) = (name for name in cache.folder.files("pairs/made") if name.endswith(".parquet"))
    before = contents(tmp_path / "cache")
    for file in (needed, unneeded):
        assert name_before_hiding(hidden_name(file)) == file
        assert cache.folder.move(file, hidden_name(file))
    put_back_needed(cache.folder, cache.folder.hidden())
    assert cache.folder.exists(needed) and not cache.folder.exists(unneeded)
    assert [entry.file for entry in find_garbage(cache, grace_s=0) if ".going" in entry.file] == [
        hidden_name(unneeded)
    ]
    assert contents(tmp_path / "cache")[needed] == before[needed]
    assert name_before_hiding("pairs/demo/train/.manifest.json.going") is None
    assert name_before_hiding(needed) is None


def test_files_of_others_that_may_not_be_removed_are_left_with_a_remark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_leftovers(tmp_path / "cache")
    of_others = {*(tmp_path / "cache/pairs/made/train").glob("*.parquet")}
    refuse(monkeypatch, errno.EPERM, lambda path: path in of_others, REMOVING)
    collect(tmp_path / "cache")
    assert all(path.exists() for path in of_others) and len(Cache(tmp_path / "cache").references()) == 1
    assert "1 files of other users stay" in caplog.text and "Operation not permitted" in caplog.text


def test_a_disk_that_fails_is_an_error_and_what_was_hidden_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_leftovers(tmp_path / "cache")
    lonely = next(entry for entry in cache.references() if entry != cache.pairs("demo").reference_id)
    files = sorted(cache.folder.files(f"references/{lonely}"))
    before = contents(tmp_path / "cache")
    refuse(monkeypatch, errno.EIO, lambda path: path.name == "reference.json", ("rename",))
    with pytest.raises(StorageError, match="Input/output error"):
        remove_unneeded(open_folder(tmp_path / "cache"), files)
    assert contents(tmp_path / "cache") == before


def test_a_damaged_manifest_stops_a_removal_and_nothing_is_lost(tmp_path: Path) -> None:
    cache = make_leftovers(tmp_path / "cache")
    lonely = next(entry for entry in cache.references() if entry != cache.pairs("demo").reference_id)
    flip_file(tmp_path / "cache/pairs/demo/train/manifest.json", 30)
    before = contents(tmp_path / "cache")
    with pytest.raises(CorruptShardError):
        remove_unneeded(cache.folder, cache.folder.files(f"references/{lonely}"))
    assert contents(tmp_path / "cache") == before


@pytest.mark.parametrize("location", ["local", "memory"])
def test_a_file_is_moved_to_another_name(tmp_path: Path, location: str) -> None:
    folder = open_folder(tmp_path / "c" if location == "local" else f"memory://{tmp_path.name}-move")
    folder.publish("a/deep/one", b"1")
    assert folder.move("a/deep/one", "b/.two") and not folder.move("a/deep/one", "b/.two")
    assert folder.read("b/.two") == b"1" and folder.files() == {}
    assert folder.move("b/.two", "b/three") and folder.files() == {"b/three": 1}
    if isinstance(folder, LocalFolder):
        assert not (folder.root / "a").exists()
    folder.remove("b/three")
