"""Every step that the store takes on a file system, one method each.

A step can be refused, and the power can fail after it. Tests replace this disk by one that refuses a step or
forgets unsynced data, so no other code of the store changes a file system.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_cache.files.sync import sync

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class Disk:
    """The file system itself. Files and folders get the permissions that the umask leaves.

    In a folder with the set-group-ID bit that its group may write, whose files have that folder's group, the
    group may write new folders and read new files, too, whatever the umask: members share a cache.
    """

    def make_folder(self, path: Path) -> None:
        path.mkdir()
        if _is_shared(path.parent):
            with suppress(PermissionError):  # the file system has no such permissions
                path.chmod(path.stat().st_mode | stat.S_IRWXG | stat.S_ISGID)

    def create(self, path: Path) -> int:
        """Descriptor of a new, empty file."""
        is_shared = _is_shared(path.parent)
        descriptor = os.open(path, NEW_FILE, 0o666)
        if is_shared:
            with suppress(PermissionError):
                os.fchmod(descriptor, os.fstat(descriptor).st_mode | stat.S_IRGRP)
        return descriptor

    def write(self, descriptor: int, content: bytes) -> None:
        """Append all of the content. A nearly full file system takes a part first and refuses the rest."""
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]

    def sync_file(self, descriptor: int) -> None:
        """Wait until the file's bytes are on the disk; for its name see `sync_folder`."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)  # NFS reports a full disk here

    def rename(self, old: Path, new: Path) -> None:
        """Give the file its name in one step, replacing a file of that name."""
        os.replace(old, new)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in the folder are on the disk."""
        sync(path)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Remove the folder, if it is empty."""
        path.rmdir()

    # -- reading ---------------------------------------------------------------------------------------

    def status(self, path: Path) -> os.stat_result:
        return path.stat()

    def names(self, path: Path) -> list[str]:
        return os.listdir(path)

    def entries(self, path: Path) -> Iterator[os.DirEntry[str]]:
        """The folder's entries; those with a dot, too."""
        with os.scandir(path) as found:
            yield from found

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def open(self, path: Path) -> Any:
        """An open file, readable at any position, even after its name is removed or given to another file."""
        try:
            return pa.OSFile(str(path))
        except OSError as error:  # pyarrow's message repeats the path
            raise OSError(error.errno, os.strerror(error.errno or 0)) from error


def _is_shared(folder: Path) -> bool:
    """Return whether new files get the group of this folder, whose members may write in it."""
    shared = stat.S_ISGID | stat.S_IWGRP
    return os.name == "posix" and folder.stat().st_mode & shared == shared
