"""A cache folder behind an fsspec URL. A file is published by one PUT."""

from __future__ import annotations

from typing import Any

import fsspec

from dpo_cache.errors import StorageError
from dpo_cache.store.failures import storage_error


def open_remote(url: str) -> RemoteFolder:
    """The folder at an fsspec URL; `StorageError` where no package serves it."""
    try:
        filesystem, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{url}: no file system for this URL ({error}).\nInstall the fsspec package it names.") from error
    return RemoteFolder(filesystem, root, url)


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
            raise storage_error("write", f"{self.url}/{name}", error) from error

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        try:
            return self.filesystem.cat_file(f"{self.root}/{name}")
        except OSError as error:
            raise storage_error("read", f"{self.url}/{name}", error) from error

    def exists(self, name: str) -> bool:
        try:
            return self.filesystem.exists(f"{self.root}/{name}")
        except OSError as error:
            raise storage_error("look for", f"{self.url}/{name}", error) from error

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly inside, sorted; empty where there is no folder."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(f"{self.root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("list", f"{self.url}/{folder}", error) from error
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def files(self, folder: str = "") -> dict[str, int]:
        """Every published file below the folder, by its name from the root, with its size in bytes; sorted by name."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.find(f"{self.root}/{folder}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error("list", f"{self.url}/{folder}", error) from error
        sizes = {path[len(self.root) + 1 :]: int(details["size"]) for path, details in found.items()}
        return {name: sizes[name] for name in sorted(sizes) if not any(part.startswith(".") for part in name.split("/"))}

    def size(self, name: str) -> int:
        """The file's size in bytes."""
        try:
            return int(self.filesystem.size(f"{self.root}/{name}"))
        except OSError as error:
            raise storage_error("read", f"{self.url}/{name}", error) from error

    def remove(self, name: str) -> None:
        """Remove the file; nothing happens where it is gone already."""
        try:
            self.filesystem.rm_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error("remove", f"{self.url}/{name}", error) from error

    def hidden(self) -> dict[str, int]:
        """What `files` leaves out: here, what was set aside; sizes in bytes by name."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise storage_error("list", self.url, error) from error
        sizes = {path[len(self.root) + 1 :]: int(details["size"]) for path, details in found.items()}
        return {name: sizes[name] for name in sorted(sizes) if any(part.startswith(".") for part in name.split("/"))}

    def links(self) -> list[str]:
        """None: an object store has no links."""
        return []

    def modified(self, name: str) -> float | None:
        """When the file was written, in seconds since 1970; None where it is gone or the store does not say."""
        try:
            return self.filesystem.modified(f"{self.root}/{name}").timestamp()
        except (FileNotFoundError, NotImplementedError, KeyError, AttributeError):
            return None
        except OSError as error:
            raise storage_error("read", f"{self.url}/{name}", error) from error

    def open_parquet(self, name: str) -> Any:
        """What `pyarrow.parquet.ParquetFile` can read single columns and row groups from."""
        return self.filesystem.open(f"{self.root}/{name}", "rb")

    def free_bytes(self) -> int | None:
        """Unknown: an object store does not say."""
        return None
