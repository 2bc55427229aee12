"""A cache folder on a disk.

A file is published as a dot-file that is written, synced and renamed, and its folder is synced: after
`publish` returns it survives a power cut on any file system that honours fsync, and a crash before that
leaves only a dot-file, which no reader looks at.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_cache.store.failures import storage_error


class LocalFolder:
    """A cache folder on a disk."""

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def publish(self, name: str, content: bytes) -> None:
        """Write the whole file, so that it is either absent or complete and durable."""
        target = self.root / name
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(scratch, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(scratch, target)
            finally:
                scratch.unlink(missing_ok=True)
            sync(target.parent)
        except OSError as error:
            raise storage_error("write", target, error) from error

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error

    def exists(self, name: str) -> bool:
        try:
            return (self.root / name).exists()
        except OSError as error:
            raise storage_error("look for", self.root / name, error) from error

    def names(self, folder: str) -> list[str]:
        """Names of the published files and folders directly inside, sorted; empty where there is no folder."""
        try:
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("list", self.root / folder, error) from error

    def files(self, folder: str = "") -> dict[str, int]:
        """Every published file below the folder, by its name from the root, with its size in bytes; sorted by name."""
        found: dict[str, int] = {}
        try:
            for parent, folders, files in os.walk(self.root / folder, onerror=_raise_unless_missing):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in files:
                    if not name.startswith("."):
                        path = Path(parent, name)
                        found[path.relative_to(self.root).as_posix()] = path.lstat().st_size
        except OSError as error:
            raise storage_error("list", self.root / folder, error) from error
        return dict(sorted(found.items()))

    def size(self, name: str) -> int:
        """The file's size in bytes."""
        try:
            return (self.root / name).stat().st_size
        except OSError as error:
            raise storage_error("read", self.root / name, error) from error

    def remove(self, name: str) -> None:
        """Remove the file, durably; nothing happens where it is gone already. Folders left empty are removed with it."""
        target = self.root / name
        try:
            target.unlink(missing_ok=True)
            if target.parent.exists():
                sync(target.parent)
        except OSError as error:
            raise storage_error("remove", target, error) from error
        for parent in target.parents:
            if parent == self.root:
                break
            try:
                parent.rmdir()
            except OSError:  # not empty, or gone
                break

    def open_parquet(self, name: str) -> Any:
        """What `pyarrow.parquet.ParquetFile` can read single columns and row groups from."""
        return str(self.root / name)

    def prefetch(self, names: Iterable[str]) -> None:
        """Nothing: the files are here."""

    def free_bytes(self) -> int | None:
        """Bytes left on the disk that holds (or will hold) the folder; None where unknown."""
        return free_bytes(self.root)


def free_bytes(folder: Path) -> int:
    """Bytes left on the disk that holds (or will hold) the folder."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    if os.name == "nt" and path.is_dir():  # a folder cannot be opened there, and its renames are journaled
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
