import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpo_cache.errors import StorageError
from dpo_cache.store.folders.folder import Folder, LocalFolder, RemoteFolder, open_folder

KILLED_WRITER = """
import os, sys
from dpo_cache.store.folders.folder import open_folder
os.replace = lambda *_: os._exit(9)
open_folder(sys.argv[1]).publish("scores/a", b"never whole")
"""


@pytest.fixture(params=["local", "memory"])
def any_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "local":
        yield open_folder(tmp_path / "cache")
        return
    url = f"memory://{tmp_path.name}/cache"
    yield open_folder(url)
    filesystem = MemoryFileSystem()
    if filesystem.exists(f"/{tmp_path.name}"):
        filesystem.rm(f"/{tmp_path.name}", recursive=True)


def fail_with(number: int):
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def test_a_published_file_is_read_back(any_folder: Folder) -> None:
    any_folder.publish("scores/deep/a", b"\x00\xff\n")
    assert any_folder.exists("scores/deep/a")
    assert any_folder.read("scores/deep/a") == b"\x00\xff\n"


def test_an_empty_file_can_be_published(any_folder: Folder) -> None:
    any_folder.publish("a", b"")
    assert any_folder.exists("a")
    assert any_folder.read("a") == b""


def test_publishing_again_replaces_the_file(any_folder: Folder) -> None:
    any_folder.publish("a", b"first, and longer")
    any_folder.publish("a", b"second")
    assert any_folder.read("a") == b"second"
    assert any_folder.names("") == ["a"]


def test_opening_a_folder_creates_nothing(any_folder: Folder) -> None:
    assert not any_folder.exists("")
    assert any_folder.names("") == []
    assert any_folder.names("scores") == []
    assert not any_folder.exists("scores/a")


def test_names_are_sorted_and_only_those_directly_inside(any_folder: Folder) -> None:
    for name in ("b", "a/inner", "c/deep/inner", "B"):
        any_folder.publish(name, b"x")
    assert any_folder.names("") == ["B", "a", "b", "c"]
    assert any_folder.names("c") == ["deep"]


def test_every_file_below_a_folder_is_listed_with_its_size(any_folder: Folder) -> None:
    for name in ("b", "a/inner", "a/deep/inner", "a/.scratch", "B"):
        any_folder.publish(name, name.encode())
    assert any_folder.files() == {"B": 1, "a/deep/inner": 12, "a/inner": 7, "b": 1}
    assert any_folder.files("a") == {"a/deep/inner": 12, "a/inner": 7}
    assert any_folder.files("nowhere") == {}
    assert any_folder.size("a/inner") == 7


def test_a_removed_file_is_gone_and_removing_it_again_is_harmless(any_folder: Folder) -> None:
    any_folder.publish("a/deep/inner", b"x")
    any_folder.publish("a/kept", b"x")
    for _ in range(2):
        any_folder.remove("a/deep/inner")
    assert any_folder.files() == {"a/kept": 1}


def test_dot_files_are_never_listed(any_folder: Folder) -> None:
    any_folder.publish("scores/.a.parquet.0123abcd.tmp", b"half")
    any_folder.publish("scores/b.parquet", b"whole")
    assert any_folder.names("scores") == ["b.parquet"]


def test_files_of_another_writer_are_seen_at_once(any_folder: Folder) -> None:
    assert any_folder.names("scores") == []
    open_folder(str(any_folder)).publish("scores/a", b"x")
    assert any_folder.names("scores") == ["a"]
    assert any_folder.exists("scores/a")


def test_reading_what_is_not_there_is_a_storage_error(any_folder: Folder) -> None:
    with pytest.raises(StorageError, match=f"^cannot read {re.escape(str(any_folder))}/scores/a: "):
        any_folder.read("scores/a")


def test_single_columns_of_a_parquet_file_can_be_read(any_folder: Folder) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"one": [1, 2], "two": [3, 4]}), sink)
    any_folder.publish("scores/a.parquet", sink.getvalue().to_pybytes())
    with pq.ParquetFile(any_folder.open_parquet("scores/a.parquet")) as file:
        assert file.read(columns=["two"]).to_pydict() == {"two": [3, 4]}


def test_free_bytes_are_those_of_the_disk_that_will_hold_the_folder(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    free = open_folder(tmp_path / "not" / "yet").free_bytes()
    assert free is not None
    assert abs(free - status.f_bavail * status.f_frsize) < 2**30


def test_an_object_store_does_not_say_how_much_is_free() -> None:
    assert open_folder("memory://anywhere").free_bytes() is None


def test_paths_and_urls_open_their_kind_of_folder(tmp_path: Path) -> None:
    assert isinstance(open_folder(tmp_path), LocalFolder)
    assert open_folder(f"file://{tmp_path}").root == tmp_path
    assert open_folder("~/cache").root == Path.home() / "cache"
    assert isinstance(open_folder("memory://cache"), RemoteFolder)
    assert str(open_folder("memory://cache")) == "memory://cache"


def test_a_url_of_no_known_kind_is_a_storage_error() -> None:
    with pytest.raises(
        StorageError,
        match=r"^nowhere://cache: no file system for this URL \(.*\).\nUse a folder, s3://, gs://, hf:// or another URL of fsspec.$",
    ):
        open_folder("nowhere://cache")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_no_file(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder.publish("scores/before", b"x")
    monkeypatch.setattr(failing, fail_with(errno.EIO))
    with pytest.raises(StorageError):
        folder.publish("scores/a", b"content")
    assert not folder.exists("scores/a")
    assert os.listdir(folder.root / "scores") == ["before"]


def test_a_failed_replacement_keeps_the_old_file(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.publish("manifest.json", b"old")
    monkeypatch.setattr("os.replace", fail_with(errno.EIO))
    with pytest.raises(StorageError):
        folder.publish("manifest.json", b"new")
    assert folder.read("manifest.json") == b"old"


def test_a_writer_killed_before_the_rename_leaves_nothing_that_is_seen(folder: LocalFolder) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(folder)], check=False)
    assert killed.returncode == 9
    left = os.listdir(folder.root / "scores")
    assert len(left) == 1
    assert left[0].startswith(".") and left[0].endswith(".tmp")
    assert folder.names("scores") == []
    assert not folder.exists("scores/a")
    folder.publish("scores/a", b"whole")
    assert folder.names("scores") == ["a"]


def test_an_interrupted_write_is_swept_away(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.publish("scores/a", b"content")
    assert os.listdir(folder.root / "scores") == []


def test_a_full_disk_is_told_with_what_to_do(folder: LocalFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", fail_with(errno.ENOSPC))
    with pytest.raises(StorageError) as caught:
        folder.publish("scores/a", b"content")
    assert str(caught.value) == (
        f"cannot write {folder}/scores/a: No space left on device.\n"
        "The disk is full: free some space and run the same command again; what was published is kept."
    )


@pytest.mark.parametrize(
    ("failing", "number", "message"),
    [
        ("os.fsync", errno.EDQUOT, "Disk quota exceeded.\nThe quota is used up: "),
        (
            "os.mkdir",
            errno.EROFS,
            "Read-only file system.\nThe file system is read-only: choose another `cache`.",
        ),
        (
            "os.mkdir",
            errno.EACCES,
            "Permission denied.\nPermission denied: choose another `cache` or change its permissions.",
        ),
        ("os.replace", errno.EPERM, "Operation not permitted.\nPermission denied: choose another `cache`"),
        (
            "os.fsync",
            errno.EIO,
            "Input/output error.\nThe disk failed, not the cache: look at the system's log, then run",
        ),
    ],
)
def test_each_refusal_of_the_file_system_has_its_advice(
    folder: LocalFolder, monkeypatch: pytest.MonkeyPatch, failing: str, number: int, message: str
) -> None:
    monkeypatch.setattr(failing, fail_with(number))
    with pytest.raises(StorageError) as caught:
        folder.publish("scores/a", b"content")
    assert str(caught.value).startswith(f"cannot write {folder}/scores/a: {message}")


def test_a_file_in_the_place_of_a_folder_is_a_storage_error(folder: LocalFolder) -> None:
    folder.publish("scores", b"a file")
    with pytest.raises(StorageError, match="Something in this path is a file"):
        folder.publish("scores/a", b"content")
    with pytest.raises(StorageError, match="^cannot list .*\nSomething in this path is a file"):
        folder.names("scores")


def test_a_refusal_of_the_object_store_names_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail_with(errno.EACCES))
    with pytest.raises(StorageError) as caught:
        open_folder("memory://cache").publish("scores/a", b"content")
    assert str(caught.value) == (
        "cannot write memory://cache/scores/a: Permission denied.\n"
        "Access was refused: check that these credentials may list, read and write there."
    )


def test_a_path_that_the_file_system_cannot_have_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_folder(tmp_path / ("x" * 300)).exists("format.json")


def test_a_place_is_tried_before_anything_is_made_there(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "a" / "b")
    folder.check_writable()
    assert not any(tmp_path.iterdir())
    folder.disk.make_folder = fail_with(errno.EACCES)  # type: ignore[method-assign]
    with pytest.raises(
        StorageError, match=f"^cannot write {tmp_path}/a/b: Permission denied.\nPermission denied: "
    ):
        folder.check_writable()
