"""A cache folder behind an fsspec URL: `s3://`, `gs://`, `hf://` and others.

- A file is published by one PUT, which a reader sees wholly or not at all, and its size is checked
  afterwards. A part that is there already, with its size, is not sent again: its name is its content.
- A named file is requested by its name and not searched in a listing, because listings may be late. Files
  that this process published or removed are requested by name before a listing is used. fsspec's cache of
  listings is off.
- Calls that fail for a moment are repeated (`retries.py`); connecting and reading have time-outs.
- Whole parts are read through copies on the local disk, checked by their digest (`local_copies.py`). Footers
  and keys are read by ranges (`ranges.py`). `read` always reads from the store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.asyn import AsyncFileSystem
from fsspec.core import split_protocol

from dpo_cache.errors import MissingFileError, OptionError, StorageError, first_line
from dpo_cache.store.folders.local_copies import is_part_name
from dpo_cache.store.folders.ranges import RangeFile
from dpo_cache.store.folders.remote_parts import RemoteParts
from dpo_cache.store.folders.retries import remote_error, with_retries

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECT_S, READ_S = 10, 60
# the limit of a whole call: some waits have no time-out, such as the one before a PUT sends its body
CALL_S, SLOWEST_BYTES_PER_S = 120.0, 100_000
LISTING_S = 1800.0
CHUNK_BYTES = 32 << 20  # fetched by one request: what a broken connection costs
THREADS = 8
PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "abfs": "adlfs",
    "az": "adlfs",
}

# by URL and name: whether this process published (True) or removed (False) the file
_own_changes: dict[str, dict[str, bool]] = {}


def open_remote(url: str) -> RemoteFolder:
    """The folder at an fsspec URL; no request is sent yet.

    Raises `StorageError` where no package serves the URL, `OptionError` for one that cannot be a folder.
    """
    protocol = split_protocol(url)[0] or ""
    if "?" in url:
        raise OptionError(
            f"{url}: a cache's URL has no query (?…).\n"
            "Give options of the store by fsspec's configuration, for example FSSPEC_S3_…."
        )
    try:
        filesystem, root = fsspec.url_to_fs(url, **_settings(protocol))
    except ImportError as error:
        package = PACKAGES.get(protocol)
        fix = f"Run `pip install {package}`." if package else "Install the package that it names."
        raise StorageError(
            f"{url}: the package for this kind of URL is missing ({first_line(error)}).\n{fix}"
        ) from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "hf"))
        raise StorageError(
            f"{url}: no file system for this URL ({first_line(error)}).\n"
            f"Use a folder, {known} or another URL of fsspec."
        ) from error
    except Exception as error:  # some connect, or look for credentials, when they are made
        raise remote_error("open", url, error, 1, 0.0) from error
    if {".", ".."} & set(root.split("/")):
        raise OptionError(f"{url}: a cache's URL has no '.' or '..' in it.\nWrite it without them.")
    if protocol in PACKAGES and not root.strip("/"):
        raise OptionError(
            f"{url}: names no {'repository' if protocol == 'hf' else 'bucket'}.\n"
            f"Expected for example {protocol}://NAME/cache."
        )
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1  # type: ignore[attr-defined]  # see retries.py
    return RemoteFolder(filesystem, root, url)


def _settings(protocol: str) -> dict[str, Any]:
    """Arguments of the file system: no memory of listings, and time-outs where it has none of its own."""
    if protocol in ("s3", "s3a"):
        own = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"total_max_attempts": 1}}
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        return {"use_listings_cache": False, "max_concurrency": 1, "config_kwargs": {**own, **configured}}
    if protocol in ("gs", "gcs"):
        return {"use_listings_cache": False, "requests_timeout": READ_S}
    return {"use_listings_cache": False} if protocol in PACKAGES else {}


class RemoteFolder:
    """A cache folder behind an fsspec URL."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str):
        self.filesystem, self.root, self.url = filesystem, root.rstrip("/"), url.rstrip("/") if root else url
        self.parts = RemoteParts(self.url, self.size, self._pieces)
        self._own = _own_changes.setdefault(self.url, {})

    def __str__(self) -> str:
        return self.url

    def publish(self, name: str, content: bytes) -> None:
        """Write the whole file in one PUT."""
        if is_part_name(_base(name)) and self._find_size(name) == len(content):
            return
        path, options = self._path(name), self._limit(len(content))
        if "s3" in self.filesystem.protocol:
            options["chunksize"] = min(max(len(content), 1), 2 << 30)  # s3fs splits larger content
        self._call("write", name, lambda: self.filesystem.pipe_file(path, content, **options))
        self._own[name] = True
        self.parts.forget(name)
        found = self._find_size(name)
        if found != len(content):
            raise StorageError(
                f"cannot write {self.url}/{name}: {len(content)} bytes were sent, the store holds "
                f"{'none' if found is None else found}.\n"
                "Run the same command again; what was published before is kept."
            )

    def read(self, name: str) -> bytes:
        """The file's bytes, as the store has them now. Raises `MissingFileError` where it is not there."""
        if is_part_name(_base(name)):
            return b"".join(self._pieces(name, 0, self.size(name)))
        path, limit = self._path(name), self._limit(CHUNK_BYTES)
        return bytes(self._call("read", name, lambda: self.filesystem.cat_file(path, **limit)))

    def open_parquet(self, name: str) -> pa.NativeFile:
        """The part, open for reading: its local copy, which is fetched first where there is none.

        Raises `CorruptShardError` where the store's bytes do not hash to the name.
        """
        if not is_part_name(_base(name)):
            return pa.BufferReader(self.read(name))
        return self.parts.open_whole(name)

    def open_pinned(self, name: str) -> pa.NativeFile | None:
        """The same, to be open for long: None where there is no room for a local copy."""
        if not is_part_name(_base(name)):
            return pa.BufferReader(self.read(name))
        return self.parts.open_pinned(name)

    def open_ranges(self, name: str, *, is_brief: bool = False) -> pa.NativeFile | RangeFile:
        """The part, to read some of it: its local copy where there is one, else ranges from the store, which
        are not hashed. With `is_brief`, for a footer, no copy is hashed for it.
        """
        if not is_part_name(_base(name)):
            return pa.BufferReader(self.read(name))
        return self.parts.open_ranges(name, is_brief=is_brief)

    def keeps(self, name: str) -> bool:
        """Return whether an open file of this name may stay open: it is a local copy."""
        return self.parts.keeps(name)

    def each(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The call's result for each item, in order; several calls are under way at once."""
        with ThreadPoolExecutor(THREADS, thread_name_prefix="parts") as pool:
            try:
                yield from pool.map(call, items)
            finally:
                pool.shutdown(cancel_futures=True)

    def exists(self, name: str) -> bool:
        """Return whether the file is there, or files below a folder of this name."""
        return self._find(name) is not None

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly inside, sorted; empty where there is no folder."""
        path, limit = self._path(folder), self._limit(seconds=LISTING_S)
        found = self._look("list", folder, lambda: self.filesystem.ls(path, detail=True, **limit))
        sizes = {entry["name"].rstrip("/"): entry.get("size") for entry in found or ()}
        self._note_sizes(sizes)
        listed = {_base(entry) for entry in sizes if entry != path}
        prefix = f"{folder}/" if folder else ""
        # a listing may be late, so these files are requested by name
        for name, is_published in list(self._own.items()):
            child = name[len(prefix) :].split("/")[0]
            # a folder stays when one of its files is removed
            may_differ = is_published or name == prefix + child
            if name.startswith(prefix) and may_differ and is_published is not (child in listed):
                change = listed.discard if self._find_size(name) is None else listed.add
                change(child)
        return sorted(name for name in listed if _is_safe(name))

    def hidden_names(self, folder: str) -> list[str]:
        """Names of the dot-files directly inside, sorted."""
        path, limit = self._path(folder), self._limit(seconds=LISTING_S)
        found = self._look("list", folder, lambda: self.filesystem.ls(path, detail=False, **limit))
        names = {_base(entry) for entry in found or ()}
        return sorted(name for name in names if name.startswith(".") and _is_below(name))

    def files(self, folder: str = "") -> dict[str, int]:
        """Every published file below the folder, by its name from the root, with its size in bytes; sorted by
        name.
        """
        sizes = self._sizes(folder)
        for name, is_published in list(self._own.items()):
            if name.startswith(f"{folder}/" if folder else "") and is_published is not (name in sizes):
                size = self._find_size(name)
                sizes.pop(name, None)
                if size is not None:
                    sizes[name] = size
        return {name: sizes[name] for name in sorted(sizes) if _is_safe(name)}

    def hidden(self) -> dict[str, int]:
        """Sizes in bytes of the files that `files` leaves out: those set aside by `verify --repair`."""
        sizes = self._sizes("")
        return {name: sizes[name] for name in sorted(sizes) if _is_below(name) and not _is_safe(name)}

    def links(self) -> list[str]:
        """None: an object store has no links."""
        return []

    def closed_folders(self) -> list[str]:
        """None: a store lists all or nothing."""
        return []

    def check_inside(self, name: str) -> None:
        """Nothing: an object store has no links."""

    def modified(self, name: str) -> float | None:
        """When the file was written, in seconds since 1970; None where it is gone or the time is unknown."""
        try:
            return self._call("read", name, lambda: self.filesystem.modified(self._path(name))).timestamp()
        except StorageError as error:
            if isinstance(error, MissingFileError) or isinstance(
                error.__cause__, NotImplementedError | KeyError
            ):
                return None
            raise

    def size(self, name: str) -> int:
        """The file's size in bytes."""
        size = self._find_size(name)
        if size is None:
            raise self._missing("read", name)
        return size

    def remove(self, name: str) -> None:
        """Remove the file; nothing happens where it is gone already."""
        with suppress(MissingFileError):
            self._call("remove", name, lambda: self.filesystem.rm_file(self._path(name), **self._limit()))
        self._own[name] = False
        self.parts.forget(name)

    def move(self, name: str, to: str) -> bool:
        """Copy the file to another name, then remove it; False where it is gone."""
        source, target = self._path(name), self._path(to)
        try:
            self._call("move", name, lambda: self.filesystem.cp_file(source, target, **self._limit()))
        except MissingFileError:
            return False
        self._own[to] = True
        self.remove(name)
        return True

    def free_bytes(self) -> int | None:
        """None: an object store reports no free space."""
        return None

    def check_writable(self, names: Iterable[str] = ()) -> None:  # noqa: ARG002 (for local folders)
        """Raise `StorageError` where nothing can be written: a small file is, and is removed again.

        Nothing where this process has written before. It does not matter whether files can be removed.
        """
        if not self._own:
            probe = f".{secrets.token_hex(8)}.tmp"
            self.publish(probe, b"dpo-cache")
            with suppress(StorageError):
                self.remove(probe)
            self._own[probe] = False

    def _limit(self, num_bytes: int = 0, seconds: float | None = None) -> dict[str, float]:
        """The longest that a call may take, for a file system that runs its calls on fsspec's own loop."""
        if not isinstance(self.filesystem, AsyncFileSystem):
            return {}
        return {"timeout": (CALL_S if seconds is None else seconds) + num_bytes / SLOWEST_BYTES_PER_S}

    # -- one call each ---------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    def _missing(self, verb: str, name: str) -> MissingFileError:
        return MissingFileError(
            f"cannot {verb} {self.url}/{name}: there is no such file.\n"
            "It was removed, or never published there."
        )

    def _call(self, verb: str, name: str, call: Callable[[], Result]) -> Result:
        try:
            return with_retries(verb, f"{self.url}/{name}".rstrip("/"), call)
        except FileNotFoundError as error:
            raise self._missing(verb, name) from error

    def _look(self, verb: str, name: str, call: Callable[[], Result]) -> Result | None:
        """The result of a call that no cache of listings answers; None where there is no such name."""

        def fresh() -> Result:
            self.filesystem.invalidate_cache()
            return call()

        with suppress(MissingFileError):
            return self._call(verb, name, fresh)
        return None

    def _find(self, name: str) -> dict[str, Any] | None:
        """The store's entry for the file or folder of this name; None if there is neither."""
        path = self._path(name)
        return self._look("look for", name, lambda: self.filesystem.info(path, **self._limit()))

    def _find_size(self, name: str) -> int | None:
        found = self._find(name)
        return int(found["size"] or 0) if found is not None and found["type"] == "file" else None

    def _sizes(self, folder: str) -> dict[str, int]:
        path, limit = self._path(folder), self._limit(seconds=LISTING_S)
        found = self._look("list", folder, lambda: self.filesystem.find(path, detail=True, **limit))
        sizes = {path: int(details["size"]) for path, details in (found or {}).items()}
        self._note_sizes(sizes)
        start = len(self.root) + 1
        return {path[start:]: size for path, size in sizes.items() if path.startswith(f"{self.root}/")}

    def _note_sizes(self, sizes: dict[str, Any]) -> None:
        """Remember the sizes of parts by their whole paths, so that reading them needs no request for it."""
        for path, size in sizes.items():
            if isinstance(size, int) and is_part_name(_base(path)):
                self.parts.sizes[path[len(self.root) + 1 :]] = size

    def _pieces(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """The file's bytes from `start` to `end`: a connection that breaks costs one of the ranges."""
        for at in range(start, end, CHUNK_BYTES):
            request = partial(self._read_range, name, at, min(at + CHUNK_BYTES, end))
            yield self._call("read", name, request)

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        content = self.filesystem.cat_file(self._path(name), start=start, end=end, **self._limit(end - start))
        if len(content) != end - start:
            raise EOFError(f"{len(content)} bytes came where {end - start} were requested")
        return content


def _base(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _is_safe(name: str) -> bool:
    """Return whether a listed name is one that could have been published: below the root on any system, and
    no dot-file.
    """
    return _is_below(name) and not any(part.startswith(".") for part in name.split("/"))


def _is_below(name: str) -> bool:
    return all(part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in name.split("/"))
