"""Local copies of parts that were read from a remote cache.

    <folder>/<sha256>.parquet       named by content, so copies serve every cache that holds the part
    <folder>/.<sha256>.parquet.<hex>.tmp    a download in progress, of its final size; removed after a day

The folder is `$DPO_CACHE_PARTS`, else `dpo-cache/parts` in the user's cache folder (`$XDG_CACHE_HOME`, else
`~/.cache`). It takes at most `$DPO_CACHE_PARTS_GB` gigabytes of the disk (default 20), however many processes
share it: before a download, room for it is made and taken. The copies that were not used for longest are
removed, except those that a process has open, whose bytes would stay on the disk. A part for which there is
no room is not kept.

An open copy has a shared lock, and the folder is locked while room is made. Locks end with their process. On
file systems without locks, open copies may be removed, and each process may exceed the limit by one file.

Users may share the folder. A copy that this user may not read is downloaded again, and one that this user may
not remove stays and counts; where the folder takes no new files, nothing is kept. A copy is hashed when a
process first opens it, so damage is never read, and again when its size or time has changed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dpo_cache.errors import OptionError, StorageError
from dpo_cache.log import log_remark
from dpo_cache.store.folders.disk import NEW_FILE
from dpo_cache.store.folders.failures import ADVICE, TOO_MANY_OPEN

try:
    import fcntl
except ImportError:  # Windows, where no open file can be removed
    fcntl = None  # type: ignore[assignment]

DEFAULT_LIMIT_GB = 20.0
STALE_S = 86_400.0  # a download that is this old was cut off
HASH_BYTES = 2**20  # read at once while a file is hashed
LOCK_TRIES, LOCK_WAIT_S = 250, 0.02  # a process that was halted while it made room holds up others for 5 s
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}

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
        self._hashed: dict[str, Mark] = {}  # the copies that this process has hashed and found whole
        self._has_logged = False

    def open(self, name: str, num_bytes: int, download: Download) -> pa.OSFile | None:
        """The part, open for reading; its bytes hash to its name. None where no copy can be kept.

        It is downloaded where there is no copy that can be read. Raises `WrongDigestError` when the digest of
        the download is wrong, `StorageError` when the disk fails, and all errors of `download`.
        """
        try:
            copy = self._open_copy(name)
            return self._fetch(name, num_bytes, download) if copy is None else copy
        except OSError as error:
            advice = "Set DPO_CACHE_PARTS to a folder with room, or DPO_CACHE_PARTS_GB to fewer gigabytes."
            raise StorageError(
                f"cannot keep a copy of a remote part in {self.folder}: {error.strerror or error}.\n"
                + (ADVICE[error.errno] if error.errno in TOO_MANY_OPEN else advice)
            ) from error

    def open_held(self, name: str, *, only_hashed: bool = False) -> pa.OSFile | None:
        """The copy, open for reading; None where there is none.

        With `only_hashed`, also None unless this process has hashed it before, which takes long for many.
        """
        if only_hashed and not self.holds(name):
            return None
        with suppress(OSError):
            return self._open_copy(name)
        return None

    def holds(self, name: str) -> bool:
        """Return whether there is a copy that this process has read and found whole."""
        with suppress(OSError):
            return self._hashed.get(name) == _mark((self.folder / name).stat())
        return False

    def _open_copy(self, name: str) -> pa.OSFile | None:
        path = self.folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return None
            file = pa.OSFile(str(path))
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:
                raise
            return None  # none there, or another user's
        with suppress(OSError):  # an unreadable copy counts as damaged
            if self._is_usable(file, path):
                return file
        file.close()
        return None

    def _is_usable(self, file: pa.OSFile, path: Path) -> bool:
        """Return whether the open copy, which is kept from now on, has the bytes that it should have; a
        damaged one is removed.
        """
        is_kept = _try_lock(file.fileno(), exclusive=False)
        mark = _mark(os.fstat(file.fileno()))
        if not is_kept or mark != _mark(path.stat()):  # removed or replaced by another process just now
            return False
        if self._hashed.get(path.name) != mark:
            if not _is_whole(file, path.name):
                _unlink(path)
                return False
            self._hashed[path.name] = mark
        with suppress(OSError):  # another user's: it then only seems older
            os.utime(path, ns=(time.time_ns(), mark[2]))  # for mounts that record no access times
        return True

    def _fetch(self, name: str, num_bytes: int, download: Download) -> pa.OSFile | None:
        scratch = self._reserve(name, num_bytes)
        if scratch is None:
            return None
        try:
            with open(scratch, "r+b") as file:
                download(file)
                file.truncate()
            opened = pa.OSFile(str(scratch))
            if not _is_whole(opened, name):
                opened.close()
                raise WrongDigestError(name)
            return self._keep(scratch, name, opened)
        finally:
            _unlink(scratch)

    def _reserve(self, name: str, num_bytes: int) -> Path | None:
        """A scratch file of the part's size, so that others count it; None where no copy can be kept."""
        if num_bytes > self.limit_bytes:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if self._make_room(num_bytes) + num_bytes > self.limit_bytes:
                    return None
                scratch = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
                descriptor = os.open(scratch, NEW_FILE, 0o666)
                try:
                    os.ftruncate(descriptor, num_bytes)
                finally:
                    os.close(descriptor)
                return scratch
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self._log_refusal(error)
            return None

    def _keep(self, scratch: Path, name: str, opened: pa.OSFile) -> pa.OSFile:
        """The open download, which is the copy from now on, unless another process was faster or another
        user's file is in its place.
        """
        _try_lock(opened.fileno(), exclusive=False)
        with self._locked():
            other = self._open_copy(name)
            if other is not None:
                opened.close()
                return other
            try:
                os.replace(scratch, self.folder / name)
                self._hashed[name] = _mark(os.fstat(opened.fileno()))
            except (PermissionError, IsADirectoryError) as error:  # in its place is another user's file
                self._log_refusal(error)
        return opened

    def _make_room(self, num_bytes: int) -> int:
        """Bytes held after removing stale downloads and, oldest use first, the copies that leave no room for
        so many bytes more.
        """
        copies, held, now = [], 0, time.time()
        for path in list(self.folder.iterdir()):
            is_copy = is_part_name(path.name)
            try:
                status = path.lstat()
            except OSError:  # removed by another process
                continue
            if not stat.S_ISREG(status.st_mode) or not (is_copy or path.name.endswith(".tmp")):
                continue
            if not is_copy and now - status.st_mtime > STALE_S and _unlink(path):
                continue
            held += status.st_size
            if is_copy:
                copies.append((status.st_atime_ns, status.st_size, path))
        for _, size, path in sorted(copies):
            if held + num_bytes <= self.limit_bytes:
                break
            held -= size if _unlink_unused(path) else 0
        return held

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other process make room meanwhile."""
        descriptor = os.open(self.folder, os.O_RDONLY) if fcntl else None
        try:
            for _ in range(LOCK_TRIES):
                if descriptor is None or _try_lock(descriptor, exclusive=True):
                    break
                time.sleep(LOCK_WAIT_S)
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _log_refusal(self, error: OSError) -> None:
        if not self._has_logged:
            self._has_logged = True
            log_remark(
                f"no copies of remote parts can be kept in {self.folder} ({error.strerror}): they are read "
                "from the store each time. Set DPO_CACHE_PARTS to a folder that you may write."
            )


class WrongDigestError(Exception):
    """The downloaded bytes do not hash to the file's name."""


def is_part_name(name: str) -> bool:
    """Return whether a file's name is `<sha256>.parquet`."""
    digest, dot, suffix = name.partition(".")
    return dot + suffix == ".parquet" and len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def hash_source(source: pa.NativeFile) -> str:
    """Hex sha256 of an open file's bytes, read piece by piece; leaves it at its start."""
    digest = hashlib.sha256()
    while len(piece := source.read_buffer(HASH_BYTES)):
        digest.update(piece)
    source.seek(0)
    return digest.hexdigest()


Mark = tuple[int, int, int]  # inode, size and time: a file with the same ones was not changed


def _mark(status: os.stat_result) -> Mark:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_whole(file: pa.OSFile, name: str) -> bool:
    return f"{hash_source(file)}.parquet" == name


def _unlink(path: Path) -> bool:
    """Remove the file; whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # another user's, or a folder
        return False
    return True


def _unlink_unused(path: Path) -> bool:
    """Remove the copy unless a process has it open, or unless it is another user's; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return _try_lock(descriptor, exclusive=True) and _unlink(path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, *, exclusive: bool) -> bool:
    """Lock the open file until it is closed; False where another process has locked it. True where the file
    system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
