import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpo_cache.errors import CorruptShardError, OptionError, StorageError
from dpo_cache.store.folders.folder import Folder, LocalFolder, RemoteFolder, open_folder
from tests.store.other_user import as_other_user, needs_root

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


@pytest.mark.parametrize(
    "url",
    [
        "file:///x/a b",
        "file://localhost/x/a%20b",
        "FILE:///x/a%20b",
        "file://LOCALHOST/x/a b",
        "local:///x/a b",
    ],
)
def test_a_file_url_is_its_path(url: str) -> None:
    folder = open_folder(url)
    assert isinstance(folder, LocalFolder) and folder.root == Path("/x/a b")


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("file://cache", "file:///PATH.\ncache would be the name of a host"),
        ("file://host/x", "file:///PATH.\nhost would be the name of a host"),
        ("file://~/x", "file:///PATH.\n~ would be"),
        ("file://", "file:///PATH."),
        ("file:///x?mode=w", "no query"),
        ("file:///x#1", "no query .* and no fragment"),
        ("file:/x", "neither a path nor a URL.\nWrite file://…, or ./file:/x"),
        ("s3:/bucket/x", "neither a path nor a URL.\nWrite s3://…"),
        ("S3:bucket/x", "neither a path nor a URL.\nWrite s3://…"),
        ("hf:datasets/a/b", "neither a path nor a URL"),
        ("https:/host/x", "neither a path nor a URL"),
        ("memory://a/../b", "no '.' or '..' in it"),
    ],
)
def test_a_url_that_is_no_folder_is_refused_and_makes_none_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=problem):
        open_folder(location)
    assert not any(tmp_path.iterdir())


def test_a_folder_here_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:old").mkdir()
    assert [str(open_folder(name)) for name in ("s3:old", "./s3:new", "run:1", "c:x")] == [
        "s3:old", "s3:new", "run:1", "c:x"
    ]  # fmt: skip


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


# -- other users --------------------------------------------------------------------------------------

NAMES = ("references/r/scores/a", "pairs/p/train/manifest.json")


def is_refused(root: Path) -> str:
    """The first line of the refusal to write what `NAMES` are; empty where they can be written."""
    folder = LocalFolder(root)
    try:
        folder.check_writable(NAMES)
    except StorageError as error:
        return str(error).split("\n")[0]
    for name in NAMES:
        folder.publish(name, b"mine")
    return ""


@needs_root
@pytest.mark.parametrize(
    ("closed", "mode", "place"),
    [
        (".", 0o755, NAMES[1]),  # without a folder `pairs`
        ("references/r/scores", 0o755, NAMES[0]),
        ("references/r", 0o755, None),
        ("pairs/p/train", 0o555, NAMES[1]),
        ("pairs/p/train", 0o1777, NAMES[1]),  # another user's manifest cannot be replaced there
    ],
)
def test_what_another_users_folders_refuse_is_found_before_anything_is_written(
    open_path: Path, closed: str, mode: int, place: str | None
) -> None:
    root = open_path / "cache"
    LocalFolder(root).publish(NAMES[0] + "0", b"")
    LocalFolder(root).publish(NAMES[1], b"theirs")
    for folder in [root, *filter(Path.is_dir, root.rglob("*"))]:
        folder.chmod(0o777)
    (root / closed).chmod(mode)
    if closed == ".":
        shutil.rmtree(root / "pairs")
    before = sorted(root.rglob("*"))
    found = as_other_user(lambda: is_refused(root))
    if place is None:
        assert found == "" and (root / NAMES[1]).read_bytes() == b"mine"
    else:
        assert found.startswith(f"cannot write {root}/{place}: "), found
        assert sorted(root.rglob("*")) == before


@needs_root
def test_the_members_of_a_group_share_a_folder_that_is_theirs_whatever_their_umask(open_path: Path) -> None:
    root, group = open_path / "cache", 54000
    root.mkdir()
    os.chown(root, -1, group)
    root.chmod(0o2770)

    def write(user: int) -> str:
        folder = LocalFolder(root)
        folder.publish(f"references/r/scores/{user}", b"x")
        folder.publish("pairs/p/train/manifest.json", str(user).encode())
        return ",".join(folder.files())

    assert (
        as_other_user(lambda: write(54321), groups=(group,), umask=0o077)
        == f"{NAMES[1]},references/r/scores/54321"
    )
    assert as_other_user(lambda: write(54322), user=54322, groups=(group,), umask=0o077).count("scores") == 2
    assert as_other_user(lambda: LocalFolder(root).read(NAMES[1]), groups=(group,)) == "b'54322'"
    assert "Permission denied" in as_other_user(lambda: write(54323), user=54323)


def test_a_folder_of_one_user_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalFolder(tmp_path / "cache").publish("scores/a", b"x")
    finally:
        os.umask(before)
    modes = [(tmp_path / "cache" / name).stat().st_mode & 0o7777 for name in (".", "scores", "scores/a")]
    assert modes == [0o750, 0o750, 0o640]


# -- links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["pairs", "pairs/demo", "pairs/demo/train"])
def test_a_folder_that_is_a_link_out_of_the_cache_is_neither_written_nor_emptied(
    tmp_path: Path, link: str
) -> None:
    folder, name, outside = LocalFolder(tmp_path / "cache"), "pairs/demo/train/a", tmp_path / "outside"
    below = Path(name).relative_to(link)
    (outside / below).parent.mkdir(parents=True)
    (outside / below).write_bytes(b"theirs")
    (folder.root / link).parent.mkdir(parents=True)
    (folder.root / link).symlink_to(outside)
    acts = [
        lambda: folder.publish(name, b"x"),
        lambda: folder.publish("pairs/demo/train/b", b"x"),
        lambda: folder.remove(name),
        lambda: folder.move(name, "elsewhere"),
        lambda: folder.check_writable([name]),
    ]
    for act in acts:
        with pytest.raises(CorruptShardError, match="a link that leads out of the cache, to "):
            act()
    assert [path for path in outside.rglob("*") if path.is_file()] == [outside / below]
    assert (outside / below).read_bytes() == b"theirs"


def test_a_folder_that_is_a_link_inside_the_cache_is_written(tmp_path: Path) -> None:
    folder = LocalFolder(tmp_path / "cache")
    (folder.root / "stored").mkdir(parents=True)
    (folder.root / "pairs").symlink_to("stored")
    folder.publish("pairs/a", b"x")
    assert folder.read("pairs/a") == b"x" and (folder.root / "stored/a").exists()
