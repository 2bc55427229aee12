"""Local copies of parts that were read from a remote cache.

    <folder>/<sha256>.parquet       named by content, so copies serve every cache that holds the part
    <folder>/.<sha256>.parquet.<hex>.tmp    a download in progress; removed after a day

The folder is `$DPO_CACHE_PARTS`, else `dpo-cache/parts` in the user's cache folder (`$XDG_CACHE_HOME`, else
`~/.cache`). It holds at most `$DPO_CACHE_PARTS_GB` gigabytes (default 20): the copies that were not used for
longest go first. Any number of processes share it without locks: a copy appears by a rename, and one that is
removed while it is read stays readable through the open file. A copy is hashed when a process first opens it,
so damage is never read: the copy is dropped and fetched again. It is hashed again when its size or time has
changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dpo_cache.errors import OptionError, StorageError
from dpo_cache.files.atomic import replaced

DEFAULT_LIMIT_GB = 20.0
STALE_S = 86_400.0  # a download that is this old was cut off
HASH_BYTES = 2**20  # read at once while a file is hashed

Download = Callable[[BinaryIO], None]


def open_local_copies() -> LocalCopies:
    """The folder and its limit, from the environment. Nothing is created before something is kept."""
    text = os.environ.get("DPO_CACHE_PARTS_GB", "") or str(DEFAULT_LIMIT_GB)
    try:
        limit_bytes = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit_bytes = -1
    if limit_bytes < 0:
        raise OptionError(f"DPO_CACHE_PARTS_GB={text}: expected a number of gigabytes, 0 or more.")
    return LocalCopies(local_copies_folder(), limit_bytes)


def local_copies_folder() -> Path:
    """The folder of the copies."""
    if chosen := os.environ.get("DPO_CACHE_PARTS"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo-cache" / "parts"


class LocalCopies:
    """The folder of local copies, bounded in size."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._whole: dict[str, tuple[int, int, int]] = {}  # inode, size and time of each file with its digest
        self._held_bytes: int | None = None  # as last counted, and those that this process added since

    def open(self, name: str, download: Download) -> pa.OSFile:
        """The part, open for reading; its bytes hash to its name.

        It is downloaded where there is no copy, or where the copy is damaged. Raises `WrongDigestError` when
        the digest of a second download is wrong, too, `StorageError` when the copy cannot be kept, and all
        errors of `download`.
        """
        try:
            copy = self._open_copy(name)
            if copy is not None:
                return copy
            with suppress(WrongDigestError):
                return self._fetch(name, download)
            return self._fetch(name, download)
        except OSError as error:
            raise StorageError(
                f"cannot keep a copy of a remote part in {self.folder}: {error.strerror or error}.\n"
                "Set DPO_CACHE_PARTS to a folder with room, or DPO_CACHE_PARTS_GB to fewer gigabytes."
            ) from error

    def holds(self, name: str) -> bool:
        """Whether there is a copy, damaged or not."""
        return (self.folder / name).exists()

    def _open_copy(self, name: str) -> pa.OSFile | None:
        path = self.folder / name
        try:
            file = pa.OSFile(str(path))
        except FileNotFoundError:
            return None
        status = os.fstat(file.fileno())
        mark = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._whole.get(name) != mark:
            if not _is_whole(file, name):
                file.close()
                path.unlink(missing_ok=True)
                return None
            self._whole[name] = mark
        with suppress(OSError):  # removed by another process, or another user's: it then only seems older
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # for mounts that record no access times
        return file

    def _fetch(self, name: str, download: Download) -> pa.OSFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        with replaced(self.folder / name, is_shared=True) as scratch:
            with open(scratch, "wb") as file:
                download(file)
            opened = pa.OSFile(str(scratch))
            if not _is_whole(opened, name):
                opened.close()
                raise WrongDigestError(name)
        status = os.fstat(opened.fileno())
        self._whole[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        self._make_room(status.st_size)
        return opened

    def _make_room(self, added_bytes: int) -> None:
        """Remove the copies that were not used for longest, down to the limit."""
        if self._held_bytes is None or self._held_bytes + added_bytes > self.limit_bytes:
            self._held_bytes = self._sweep()
        else:
            self._held_bytes += added_bytes

    def _sweep(self) -> int:
        """Bytes held after removing stale downloads and, oldest use first, what is above the limit."""
        copies, now = [], time.time()
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # removed by another process
                continue
            if path.name.startswith(".") and now - status.st_mtime > STALE_S:
                path.unlink(missing_ok=True)
            elif path.suffix == ".parquet":
                copies.append((status.st_atime_ns, status.st_size, path))
        held = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if held <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held


class WrongDigestError(Exception):
    """What was downloaded does not hash to its name."""


def is_part_name(name: str) -> bool:
    """Whether a file's name is `<sha256>.parquet`."""
    digest, dot, suffix = name.partition(".")
    return dot + suffix == ".parquet" and len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def hash_source(source: pa.NativeFile) -> str:
    """Hex sha256 of an open file's bytes, read piece by piece; leaves it at its start."""
    digest = hashlib.sha256()
    while len(piece := source.read_buffer(HASH_BYTES)):
        digest.update(piece)
    source.seek(0)
    return digest.hexdigest()


def _is_whole(file: pa.OSFile, name: str) -> bool:
    return f"{hash_source(file)}.parquet" == name
