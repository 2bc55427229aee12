"""Local copies of remote parts: bounded, checked, shared between processes."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from dpo_cache.errors import OptionError, StorageError
from dpo_cache.store.folders.local_copies import (
    LocalCopies,
    WrongDigestError,
    is_part_name,
    local_copies_folder,
    open_local_copies,
)
from tests.store.conftest import flip_file
from tests.store.other_user import as_other_user, needs_root

LIMIT = 10_000

# Reads parts with up to three of them open, and checks after each that the disk has no more than the limit: the
# files of the folder, and those that this process has open without a name.
READERS = """
import hashlib, os, sys
from pathlib import Path
from dpo_cache.store.folders.local_copies import LocalCopies
folder = Path(sys.argv[1])
contents = [bytes([number]) * 1000 for number in range(20)]
parts, opened = LocalCopies(folder, 5000), []
for turn in range(100):
    content = contents[(turn * 7 + int(sys.argv[2])) % 20]
    name = hashlib.sha256(content).hexdigest() + ".parquet"
    file = parts.open(name, 1000, lambda file: file.write(content))
    if file is not None:
        assert file.read() == content
        opened.append(file)
    if len(opened) > 2 or file is None:
        opened.pop(0).close()
    taken = sum(os.fstat(file.fileno()).st_size for file in opened if not os.fstat(file.fileno()).st_nlink)
    for path in folder.iterdir():
        try:
            taken += path.stat().st_size
        except FileNotFoundError:
            pass
    assert taken <= 5000, taken
"""


def part(number: int, size: int = 1000) -> tuple[str, bytes]:
    content = number.to_bytes(4, "big") * (size // 4)
    return hashlib.sha256(content).hexdigest() + ".parquet", content


class Store:
    """A store that counts what is fetched from it."""

    def __init__(self) -> None:
        self.fetched = 0

    def download(self, content: bytes) -> Callable[[BinaryIO], None]:
        def write(file: BinaryIO) -> None:
            self.fetched += 1
            file.write(content)

        return write

    def read(self, parts: LocalCopies, number: int, size: int = 1000) -> bytes | None:
        name, content = part(number, size)
        file = parts.open(name, len(content), self.download(content))
        if file is None:
            return None
        with file:
            return file.read()


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_part_is_fetched_once(tmp_path: Path) -> None:
    store = Store()
    for parts in (LocalCopies(tmp_path / "parts", LIMIT), LocalCopies(tmp_path / "parts", LIMIT)):
        for _ in range(3):
            assert store.read(parts, 1) == part(1)[1]
    assert store.fetched == 1
    assert os.listdir(tmp_path / "parts") == [part(1)[0]]


def test_the_limit_is_kept_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, LIMIT)
    for number in range(10):
        store.read(parts, number)
    store.read(parts, 0)  # used again: no longer the oldest
    for number in range(10, 14):
        store.read(parts, number)
        assert held(tmp_path) <= LIMIT
    kept = {number for number in range(14) if parts.holds(part(number)[0])}
    assert kept == {0, *range(5, 14)}


def test_what_is_larger_than_the_limit_is_neither_fetched_nor_kept(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, LIMIT)
    store.read(parts, 1)
    assert store.read(parts, 2, size=2 * LIMIT) is None
    assert store.read(LocalCopies(tmp_path, 0), 2) is None
    assert store.fetched == 1 and parts.holds(part(1)[0]), "no other copy went for it"


def test_copies_that_are_open_stay_and_count(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, 3000)
    opened = [parts.open(part(number)[0], 1000, store.download(part(number)[1])) for number in range(3)]
    other = LocalCopies(tmp_path, 3000)
    assert store.read(other, 3) is None and store.fetched == 3
    assert all(parts.holds(part(number)[0]) for number in range(3))
    opened[1].close()
    assert store.read(other, 3) == part(3)[1]
    assert sorted(os.listdir(tmp_path)) == sorted(part(number)[0] for number in (0, 2, 3))
    assert opened[0].read() == part(0)[1]


def test_a_download_in_progress_counts_from_its_start(tmp_path: Path) -> None:
    store, other = Store(), LocalCopies(tmp_path, 1500)

    def download(file: BinaryIO) -> None:
        assert held(tmp_path) == 1000
        assert store.read(other, 2) is None
        file.write(part(1)[1])

    assert LocalCopies(tmp_path, 1500).open(part(1)[0], 1000, download) is not None


def test_one_download_is_kept_of_two_at_once(tmp_path: Path) -> None:
    name, content = part(1)
    first, second = LocalCopies(tmp_path, LIMIT), LocalCopies(tmp_path, LIMIT)
    inner = []

    def download(file: BinaryIO) -> None:
        inner.append(second.open(name, 1000, Store().download(content)))
        file.write(content)

    outer = first.open(name, 1000, download)
    assert outer is not None
    assert os.fstat(outer.fileno()).st_ino == os.fstat(inner[0].fileno()).st_ino
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("position", [0, 500, 999])
def test_a_flipped_byte_is_noticed_and_the_part_fetched_again(tmp_path: Path, position: int) -> None:
    store = Store()
    store.read(LocalCopies(tmp_path, LIMIT), 1)
    flip_file(tmp_path / part(1)[0], position)
    assert store.read(LocalCopies(tmp_path, LIMIT), 1) == part(1)[1]
    assert store.fetched == 2


def test_damage_within_one_process_is_noticed_too(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, LIMIT)
    store.read(parts, 1)
    time.sleep(0.01)  # the clock of file times ticks in steps
    flip_file(tmp_path / part(1)[0], 3)
    assert store.read(parts, 1) == part(1)[1]
    (tmp_path / part(1)[0]).write_bytes(b"")
    assert store.read(parts, 1) == part(1)[1]
    assert store.fetched == 3


def test_a_download_of_another_digest_is_never_kept(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, LIMIT)
    with pytest.raises(WrongDigestError):
        parts.open(part(1)[0], 1000, store.download(b"something else"))
    assert store.fetched == 1
    assert os.listdir(tmp_path) == []


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise StorageError("gone")

    with pytest.raises(StorageError, match="^gone$"):
        LocalCopies(tmp_path, LIMIT).open(part(1)[0], 1000, fail)
    assert os.listdir(tmp_path) == []


def test_a_copy_that_another_process_drops_stays_readable(tmp_path: Path) -> None:
    name, content = part(1)
    file = LocalCopies(tmp_path, LIMIT).open(name, 1000, Store().download(content))
    (tmp_path / name).unlink()
    assert file is not None and file.read() == content


def test_a_download_that_was_cut_off_is_swept_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / f".{'0' * 64}.00000000.tmp", tmp_path / f".{'1' * 64}.00000000.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 100_000,) * 2)
    Store().read(LocalCopies(tmp_path, LIMIT), 1)
    assert not old.exists() and new.exists()


def test_several_processes_never_take_more_than_the_limit(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", READERS, str(tmp_path), str(number)]) for number in range(2)
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    assert held(tmp_path) == 5000
    assert all(is_part_name(path.name) for path in tmp_path.iterdir())


# -- other users --------------------------------------------------------------------------------------


def open_part(folder: Path, limit: int) -> str:
    """How often part 1 was fetched, and whether it was kept, only open, or none could be opened."""
    store, parts, (name, content) = Store(), LocalCopies(folder, limit), part(1)
    file = parts.open(name, 1000, store.download(content))
    assert file is None or file.read() == content
    return f"{store.fetched} {'none' if file is None else 'kept' if parts.holds(name) else 'open'}"


@needs_root
@pytest.mark.parametrize(
    ("mode", "content", "file_mode", "limit", "outcome"),
    [
        (0o777, part(1)[1], 0o644, LIMIT, "0 kept"),  # shared: read
        (0o1777, part(1)[1], 0o644, LIMIT, "0 kept"),
        (0o555, part(1)[1], 0o644, LIMIT, "0 kept"),  # prefilled, and read-only for this user
        (0o777, part(1)[1], 0o600, LIMIT, "1 kept"),  # not readable: replaced
        (0o1777, part(1)[1], 0o600, LIMIT, "1 open"),  # not readable, and not replaceable
        (0o1777, b"damaged", 0o644, LIMIT, "1 open"),  # damaged, and not replaceable
        (0o555, b"damaged", 0o644, LIMIT, "0 none"),
        (0o555, None, 0o644, LIMIT, "0 none"),
        (0o777, None, 0o644, 1500, "1 kept"),  # the other copy goes
        (0o1777, None, 0o644, 1500, "0 none"),  # the other copy cannot be removed
        (0o777, None, 0o600, 1500, "0 none"),  # whether the other copy is in use cannot be seen
    ],
)
def test_a_copy_of_another_user_is_read_or_read_around(
    open_path: Path, mode: int, content: bytes | None, file_mode: int, limit: int, outcome: str
) -> None:
    folder = open_path / "parts"
    folder.mkdir()
    for name, held_content in ((part(1)[0], content), (part(2)[0], part(2)[1])):
        if held_content is not None:
            (folder / name).write_bytes(held_content)
            (folder / name).chmod(file_mode)
    folder.chmod(mode)
    assert as_other_user(lambda: open_part(folder, limit)) == outcome
    assert (folder / part(2)[0]).exists() == (outcome != "1 kept" or limit == LIMIT)


def test_a_file_that_no_longer_can_be_removed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parts = Store(), LocalCopies(tmp_path, 2000)
    store.read(parts, 1)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert store.read(parts, 2) == part(2)[1]
    assert store.read(parts, 3) is None and held(tmp_path) == 2000


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing"])
def test_what_is_no_file_in_the_place_of_a_copy_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / part(1)[0]
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "none")
    parts = LocalCopies(tmp_path, LIMIT)
    assert Store().read(parts, 1) == part(1)[1]
    assert parts.holds(part(1)[0]) == (kind != "folder")


def test_too_many_open_files_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    Store().read(LocalCopies(tmp_path, LIMIT), 1)
    monkeypatch.setattr("dpo_cache.store.folders.local_copies.pa.OSFile", refuse)
    with pytest.raises(StorageError, match=r"Too many open files.\nToo many files are open: raise the limit"):
        Store().read(LocalCopies(tmp_path, LIMIT), 1)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError,
        match=r"^cannot keep a copy of a remote part in .*file/parts: .*\nSet DPO_CACHE_PARTS to a folder with room",
    ):
        Store().read(LocalCopies(tmp_path / "file" / "parts", LIMIT), 1)


def test_folder_and_limit_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DPO_CACHE_PARTS", raising=False)
    assert local_copies_folder() == tmp_path / "dpo-cache" / "parts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert local_copies_folder() == Path.home() / ".cache" / "dpo-cache" / "parts"
    monkeypatch.setenv("DPO_CACHE_PARTS", "~/elsewhere")
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", "0.5")
    parts = open_local_copies()
    assert (parts.folder, parts.limit_bytes) == (Path.home() / "elsewhere", 500_000_000)


@pytest.mark.parametrize("limit", ["-1", "much", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("DPO_CACHE_PARTS_GB", limit)
    with pytest.raises(OptionError, match=f"^DPO_CACHE_PARTS_GB={limit}: expected a number of gigabytes"):
        open_local_copies()
