"""A lock between the processes of one user on one machine, for work that one of them does for all."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_cache.files.user_cache import user_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def node_lock(name: str) -> Iterator[None]:
    """Wait until no other process of this user on this machine is in a block of this name.

    Without locks or a writable home the block is entered at once: it must be right without the lock. The
    kernel releases the lock of a process that dies.
    """
    descriptor = _open(name)
    try:
        if descriptor is not None and fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(name: str) -> int | None:
    folder = user_cache()
    if folder is None:
        return None
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        return os.open(_path(folder, name), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None


def _path(folder: Path, name: str) -> Path:
    """Machines that share a home have a file each."""
    hashed = hashlib.sha256(f"{platform.node()} {name}".encode(errors="surrogateescape")).hexdigest()
    return folder / "locks" / f"{hashed[:32]}.lock"
