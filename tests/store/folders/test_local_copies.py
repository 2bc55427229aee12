"""Local copies of remote parts: bounded, checked, shared between processes."""

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

LIMIT = 10_000

READERS = """
import hashlib, os, sys
from pathlib import Path
from dpo_cache.store.folders.local_copies import LocalCopies
contents = [bytes([number]) * 1000 for number in range(20)]
parts = LocalCopies(Path(sys.argv[1]), 5000)
for turn in range(300):
    content = contents[(turn * 7 + int(sys.argv[2])) % 20]
    with parts.open(hashlib.sha256(content).hexdigest() + ".parquet", lambda file: file.write(content)) as file:
        assert file.read() == content
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

    def read(self, parts: LocalCopies, number: int, size: int = 1000) -> bytes:
        name, content = part(number, size)
        with parts.open(name, self.download(content)) as file:
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


def test_what_is_larger_than_the_limit_is_read_and_not_kept(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, LIMIT)
    assert store.read(parts, 1, size=2 * LIMIT) == part(1, 2 * LIMIT)[1]
    assert held(tmp_path) == 0
    assert store.read(LocalCopies(tmp_path, 0), 2) == part(2)[1]
    assert held(tmp_path) == 0


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


def test_a_download_of_another_digest_is_tried_twice_and_never_kept(tmp_path: Path) -> None:
    store, parts = Store(), LocalCopies(tmp_path, LIMIT)
    with pytest.raises(WrongDigestError):
        parts.open(part(1)[0], store.download(b"something else"))
    assert store.fetched == 2
    assert os.listdir(tmp_path) == []


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise StorageError("gone")

    with pytest.raises(StorageError, match="^gone$"):
        LocalCopies(tmp_path, LIMIT).open(part(1)[0], fail)
    assert os.listdir(tmp_path) == []


def test_a_copy_that_another_process_drops_stays_readable(tmp_path: Path) -> None:
    name, content = part(1)
    with LocalCopies(tmp_path, LIMIT).open(name, Store().download(content)) as file:
        (tmp_path / name).unlink()
        assert file.read() == content


def test_a_download_that_was_cut_off_is_swept_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / f".{'0' * 64}.00000000.tmp", tmp_path / f".{'1' * 64}.00000000.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 100_000,) * 2)
    Store().read(LocalCopies(tmp_path, LIMIT), 1)
    assert not old.exists() and new.exists()


def test_several_processes_share_a_folder_that_is_too_small_for_them(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", READERS, str(tmp_path), str(number)]) for number in range(2)
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    Store().read(LocalCopies(tmp_path, 5000), 1000)
    assert held(tmp_path) <= 5000
    assert all(is_part_name(path.name) for path in tmp_path.iterdir())


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
