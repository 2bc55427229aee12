"""A claim on a folder: one process at a time works in it, and the claim of a dead process ends by itself.

    FOLDER/.claim.tmp   {"process": 4711, "host": "node7", "kernel": "429de88a…", "token": "9f…", "beat": 12}

Between processes under one kernel a lock of the file decides (`flock`), which the kernel releases when its
holder dies. The locks of a network file system may not reach other machines, and some file systems have none.
Therefore the holder also rewrites the file every `BEAT_S` seconds. A process that finds the claim of another
kernel waits: if the file changes, the holder is alive; if it stays the same for `SILENT_S` seconds, the claim
has ended. The clocks of two machines are never compared. A holder that finds another's claim in the file, for
example after its machine was suspended, has lost its own: `check` raises.

Another user's file is locked and read where it can be, and removed once its holder is dead: in a folder that
several users write, they can write each other's claims.

The name is that of a scratch file, so nothing takes it for a part of the folder's content.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_cache.errors import DpoCacheError
from dpo_cache.files.atomic import refused_writes
from dpo_cache.files.machine import running_kernel

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CLAIM = ".claim.tmp"
BEAT_S = 10.0
SILENT_S = 60.0  # a holder that is busy may miss some beats
LOOK_S = 1.0
UNKNOWN = {"process": "unknown", "host": "unknown"}
SIZE = 512  # bytes of the file, padded: each beat is one write
WRITABLE = os.O_RDWR | getattr(os, "O_BINARY", 0)

_wait = time.sleep


@contextmanager
def claimed(
    folder: Path, kind: type[DpoCacheError], holder: str, log: Callable[[str], None]
) -> Iterator[Claim]:
    """Keep other processes out of the folder, which is made if it is missing, until the block ends.

    If another process has it, raises an error of this kind: the folder, the `holder` and what to do. Folders
    that were made are removed at the end if they are empty.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        claim = _take(folder, kind, holder, log)
        try:
            yield claim
        finally:
            claim.release()
    finally:
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


class Claim:
    """The claim of this process on a folder, renewed by a thread until it is released."""

    def __init__(self, path: Path, descriptor: int, kind: type[DpoCacheError], *, has_lock: bool):
        self.descriptor = descriptor if has_lock else None  # whoever inherits it holds the lock, too
        self._path, self._file, self._kind = path, descriptor, kind
        self._token, self._beat, self._is_lost = secrets.token_hex(8), 0, False
        self._ended = threading.Event()
        self._write()
        threading.Thread(target=self._keep_renewing, name="claim", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Return whether another process had claimed the folder at the last beat."""
        return self._is_lost

    def check(self) -> None:
        """Raise if another process had claimed the folder at the last beat."""
        if self._is_lost:
            raise self._kind(
                f"{self._path.parent}: another process works here now, because this one was suspended "
                "for too long; this one stops.\nWait until the other one has ended, then continue with "
                "`resume`."
            )

    def renew(self) -> None:
        """Rewrite the file, unless another process has claimed the folder."""
        try:
            if _read(self._path).get("token") != self._token:
                self._is_lost = True
            else:
                self._beat += 1
                self._write()
        except OSError:  # the disk is full or does not answer: the next beat tries again
            pass

    def release(self) -> None:
        """Remove the file, unless it is another's."""
        self._ended.set()
        with suppress(OSError):
            self._is_lost = self._is_lost or _read(self._path).get("token") != self._token
        if self.descriptor is None:
            os.close(self._file)  # an open file cannot be removed on Windows
        if not self._is_lost:
            with suppress(OSError):
                self._path.unlink()
        if self.descriptor is not None:  # only now may another process lock the file: it sees that it is gone
            os.close(self._file)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(BEAT_S) and not self._is_lost:
            self.renew()

    def _write(self) -> None:
        content = {
            "process": os.getpid(),
            "host": platform.node()[:128],
            "kernel": running_kernel(),
            "token": self._token,
            "beat": self._beat,
        }
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(content).encode().ljust(SIZE - 1) + b"\n")
        with suppress(OSError):  # some file systems sync nothing
            os.fsync(self._file)


def _take(folder: Path, kind: type[DpoCacheError], holder: str, log: Callable[[str], None]) -> Claim:
    path = folder / CLAIM
    while True:
        with refused_writes(path, kind, "Or choose another `output`."):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                descriptor, is_writable = _open(path)
            except (FileNotFoundError, FileExistsError):  # others have removed or made it in this moment
                if path.is_symlink():
                    raise
                continue
        try:
            has_lock = False if descriptor is None else _lock(descriptor)
            if has_lock is None or _is_alive(path, folder, log, has_lock=has_lock):
                raise _refusal(path, folder, kind, holder)
            if descriptor is None or _is_at(path, descriptor):
                if descriptor is not None and is_writable:
                    return _claim(path, descriptor, kind, has_lock=has_lock)
                with refused_writes(path, kind, f"Its process has ended: let its owner remove {path}."):
                    path.unlink(missing_ok=True)
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)  # it has been removed, by its former holder or here


def _open(path: Path) -> tuple[int | None, bool]:
    """The claim's file, made if it is missing, and whether it can be written; None if it cannot even be read,
    which another user may have chosen. Raises `OSError`.
    """
    try:
        return os.open(path, WRITABLE), True  # not to be made: some systems refuse that for others' files
    except PermissionError:
        with suppress(PermissionError):
            return os.open(path, os.O_RDONLY), False
        return None, False
    except FileNotFoundError:
        descriptor = os.open(path, WRITABLE | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress(
        OSError, AttributeError
    ):  # whoever may write the folder may end the claim of a dead process
        os.fchmod(descriptor, 0o600 | (path.parent.stat().st_mode & 0o066))
    return descriptor, True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _claim(path: Path, descriptor: int, kind: type[DpoCacheError], *, has_lock: bool) -> Claim:
    with refused_writes(path, kind, "Or choose another `output`."):
        try:
            return Claim(path, descriptor, kind, has_lock=has_lock)
        except OSError:  # the disk is full
            path.unlink()
            raise


def _lock(descriptor: int) -> bool | None:
    """True if the file is locked now, None if another process has locked it, False if there are no locks."""
    try:
        if fcntl is None:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


def _is_alive(path: Path, folder: Path, log: Callable[[str], None], *, has_lock: bool) -> bool:
    """Return whether the process of the claim in the file is alive. It is not if this process, under the same
    kernel, got its lock; otherwise wait for a beat. A torn claim is completed soon, or its writer has died.
    """
    found = _read(path)
    if not found or (has_lock and found.get("kernel") == running_kernel()):
        return False
    limit_s = SILENT_S if "kernel" in found else LOOK_S
    log(
        f"{folder}: claimed by {_shown(found)}; waiting up to {limit_s:.0f} s to see whether its process "
        "is alive."
    )
    for _ in range(round(limit_s / LOOK_S)):
        _wait(LOOK_S)
        now = _read(path)
        if now != found:
            return bool(now)
    return False


def _refusal(path: Path, folder: Path, kind: type[DpoCacheError], holder: str) -> DpoCacheError:
    found = _read(path)
    name = f" ({_shown(found)})" if found else ""
    return kind(
        f"{folder}: {holder}{name}.\nWait until it has ended, or stop it, or choose another `output`."
    )


def _shown(found: dict[str, Any]) -> str:
    return f"process {found.get('process')} on {found.get('host')}"


def _read(path: Path) -> dict[str, Any]:
    """The claim in the file; empty if it is gone, or if its holder died before it wrote.

    The file is opened each time: only then network file systems fetch what others have written.
    """
    try:
        changed = path.stat().st_mtime_ns
        content = path.read_bytes()[:SIZE]
    except FileNotFoundError:
        return {}
    except PermissionError:  # then its time shows whether it changes
        return {**UNKNOWN, "kernel": "unknown", "changed": changed}
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    return {**UNKNOWN, "torn": content.hex()} if content.strip() else {}


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
