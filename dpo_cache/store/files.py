"""Whole files in a cache folder, on a disk or behind any fsspec URL.

Every file is immutable and published in one step. On a disk: a dot-file is written and synced, renamed,
and the folder is synced, so after `publish` returns the file survives a power cut on any file system
that honours fsync; a crash before that leaves only a dot-file, which no reader looks at. On an object
store one PUT does the same.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import fsspec

from dpo_cache.errors import StorageError


def open_folder(location: str | os.PathLike[str]) -> LocalFolder | RemoteFolder:
    """The folder at a path or fsspec URL. Nothing is created until something is published."""
    text = os.fspath(location)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalFolder(Path(text).expanduser())
    try:
        filesystem, root = fsspec.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{text}: no file system for this URL ({error}).\nInstall the fsspec package it names.") from error
    return RemoteFolder(filesystem, root, text)


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
            raise _storage_error("write", target, error) from error

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise _storage_error("read", self.root / name, error) from error

    def exists(self, name: str) -> bool:
        try:
            return (self.root / name).exists()
        except OSError as error:
            raise _storage_error("look for", self.root / name, error) from error

    def names(self, folder: str) -> list[str]:
        """Names of the published files and folders directly inside, sorted; empty where there is no folder."""
        try:
            return sorted(name for name in os.listdir(self.root / folder) if not name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _storage_error("list", self.root / folder, error) from error

    def open_parquet(self, name: str) -> Any:
        """What `pyarrow.parquet.ParquetFile` can read single columns and row groups from."""
        return str(self.root / name)

    def free_bytes(self) -> int | None:
        """Bytes left on the disk that holds (or will hold) the folder; None where unknown."""
        return free_bytes(self.root)


class RemoteFolder:
    """A cache folder behind an fsspec URL."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str):
        self.filesystem, self.root, self.url = filesystem, root.rstrip("/"), url

    def __str__(self) -> str:
        return self.url

    def publish(self, name: str, content: bytes) -> None:
        """Write the whole file in one PUT."""
        try:
            self.filesystem.pipe_file(f"{self.root}/{name}", content)
        except OSError as error:
            raise _storage_error("write", f"{self.url}/{name}", error) from error

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        try:
            return self.filesystem.cat_file(f"{self.root}/{name}")
        except OSError as error:
            raise _storage_error("read", f"{self.url}/{name}", error) from error

    def exists(self, name: str) -> bool:
        try:
            return self.filesystem.exists(f"{self.root}/{name}")
        except OSError as error:
            raise _storage_error("look for", f"{self.url}/{name}", error) from error

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly inside, sorted; empty where there is no folder."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(f"{self.root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _storage_error("list", f"{self.url}/{folder}", error) from error
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def open_parquet(self, name: str) -> Any:
        """What `pyarrow.parquet.ParquetFile` can read single columns and row groups from."""
        return self.filesystem.open(f"{self.root}/{name}", "rb")

    def free_bytes(self) -> int | None:
        """Unknown: an object store does not say."""
        return None


Folder = LocalFolder | RemoteFolder


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


def _storage_error(verb: str, place: Any, error: OSError) -> StorageError:
    advice = {
        errno.ENOSPC: "The disk is full: free some space and run the same command again; what was published is kept.",
        errno.EDQUOT: "The quota is used up: free some space and run the same command again; what was published is kept.",
        errno.EROFS: "The file system is read-only: choose another --cache.",
        errno.EACCES: "Permission denied: choose another --cache or change its permissions.",
        errno.EPERM: "Permission denied: choose another --cache or change its permissions.",
        errno.ENOTDIR: "Something in this path is a file: choose another --cache.",
        errno.EEXIST: "Something in this path is a file: choose another --cache.",
    }
    hint = advice.get(error.errno or 0, "Check the path and run the same command again; what was published is kept.")
    return StorageError(f"cannot {verb} {place}: {error.strerror or error}.\n{hint}")
