"""A cache folder on a disk.

A file is published as a dot-file that is written, synced and renamed, and its folder is synced: after
`publish` returns it survives a power cut on any file system that honours fsync, and a crash before that
leaves only a dot-file, which no reader opens. A folder is a name in the folder above it, so the folders above
are synced as well, up to the top of the file system, before the first file is published.

A file is published after the files that it refers to, and its folder is synced before it gets its name: no
power cut leaves a manifest without its parts, whether this process wrote them or another one just before.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dpo_cache.errors import CorruptShardError, StorageError
from dpo_cache.log import log_remark
from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.folders.failures import storage_errors

Item = TypeVar("Item")
Result = TypeVar("Result")

MARKER = "format.json"  # the file that marks a folder as a cache
ATTEMPTS = 5  # to publish a file while another process removes its folder, which it found empty


class LocalFolder:
    """A cache folder on a disk."""

    def __init__(self, root: Path, disk: Disk | None = None):
        self.root, self.disk = root, disk or Disk()
        self._had_marker = False
        self._synced: set[Path] = set()  # folders whose own names are on the disk
        self._closed: set[Path] = set()  # folders that a remark has named, because they cannot be listed

    def __str__(self) -> str:
        return str(self.root)

    def publish(self, name: str, content: bytes) -> None:
        """Write the whole file, so that it is either absent or complete and durable.

        Raises `StorageError`; then nothing is left behind, unless the disk refuses to remove files, too.
        """
        target = self.root / name
        self.check_inside(name)
        with storage_errors("write", target):
            for attempt in range(ATTEMPTS):
                self._check_marker(target)
                try:
                    return self._publish(target, content)
                except FileNotFoundError:
                    if attempt == ATTEMPTS - 1:
                        raise

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        with storage_errors("read", self.root / name):
            return self.disk.read(self.locate(name))

    def exists(self, name: str) -> bool:
        """Return whether there is a file or folder of this name. Raises `StorageError` where the disk does
        not answer.
        """
        with storage_errors("look for", self.root / name):
            found = self._status(self.root / name) is not None
        self._had_marker |= found and name == MARKER
        return found

    def names(self, folder: str) -> list[str]:
        """Names of the published files and folders directly inside, sorted; empty where there is no
        folder.
        """
        with storage_errors("list", self.root / folder), _absent():
            return sorted(name for name in self.disk.names(self.root / folder) if not name.startswith("."))
        return []

    def hidden_names(self, folder: str) -> list[str]:
        """Names of the dot-files directly inside, sorted."""
        with storage_errors("list", self.root / folder), _absent():
            return sorted(name for name in self.disk.names(self.root / folder) if name.startswith("."))
        return []

    def files(self, folder: str = "") -> dict[str, int]:
        """Every published file below the folder, by its name from the root, with its size in bytes; sorted by
        name.
        """
        with storage_errors("list", self.root / folder):
            return self._sizes(self.root / folder, hidden=False)

    def size(self, name: str) -> int:
        """The file's size in bytes."""
        with storage_errors("read", self.root / name):
            return self.disk.status(self.locate(name)).st_size

    def remove(self, name: str) -> None:
        """Remove the file, durably; nothing happens where it is gone already. Folders left empty are removed
        with it.
        """
        target = self.root / name
        self.check_inside(name)
        with storage_errors("remove", target):
            try:
                self.disk.unlink(target)
            except FileNotFoundError:
                if self._status(target) is not None:  # a disk that is gone for a moment raises that, too
                    raise
            with suppress(FileNotFoundError):
                self.disk.sync_folder(target.parent)
            self._had_marker &= target != self.root / MARKER
        self._remove_empty_folders(target)

    def move(self, name: str, to: str) -> bool:
        """Give the file another name in one step, durably; False where it is gone. Folders left empty are
        removed.
        """
        source, target = self.root / name, self.root / to
        self.check_inside(name)
        with storage_errors("move", source):
            self._make_folder(target.parent)
            try:
                self.disk.rename(source, target)
            except FileNotFoundError:
                if self._status(source) is not None:
                    raise
                return False
            self._sync_folders(target.parent)
            if source.parent != target.parent:
                self.disk.sync_folder(source.parent)
        self._remove_empty_folders(source)
        return True

    def hidden(self) -> dict[str, int]:
        """Sizes in bytes of the files that `files` leaves out: scratch of writers, and files set aside by
        `verify --repair`.
        """
        with storage_errors("list", self.root):
            return self._sizes(self.root, hidden=True)

    def links(self) -> list[str]:
        """Symbolic links below the folder. No published file is one."""
        return sorted(
            path.relative_to(self.root).as_posix()
            for parent, folders, files in os.walk(self.root)
            for path in (Path(parent, name) for name in folders + files)
            if path.is_symlink()
        )

    def closed_folders(self) -> list[str]:
        """Folders below that this user may not list; `files` leaves out what is in them."""
        closed: list[str] = []
        for _ in os.walk(self.root, onerror=lambda error: closed.append(str(error.filename))):
            pass
        return sorted(Path(path).relative_to(self.root).as_posix() for path in closed if os.path.exists(path))

    def modified(self, name: str) -> float | None:
        """When the file was written, in seconds since 1970; None where it is gone."""
        with storage_errors("read", self.root / name), suppress(FileNotFoundError):
            return (self.root / name).lstat().st_mtime
        return None

    def open_parquet(self, name: str) -> Any:
        """An open file for `pyarrow.parquet.ParquetFile`. It outlives its name."""
        with storage_errors("read", self.root / name):
            return self.disk.open(self.locate(name))

    def open_pinned(self, name: str) -> Any:
        """The same, to be open for long: a file here takes no more space for it."""
        return self.open_parquet(name)

    def open_ranges(self, name: str, *, is_brief: bool = False) -> Any:  # noqa: ARG002 (for remote folders)
        """The same, to read some of it."""
        return self.open_parquet(name)

    def keeps(self, name: str) -> bool:  # noqa: ARG002
        """Whether an open file may stay open: True."""
        return True

    def each(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The call's result for each item, in order, one call after the other."""
        return map(call, items)

    def locate(self, name: str) -> Path:
        """The path of a file to read. Raises `CorruptShardError` for a pipe, socket or device, and for a link
        out of the cache.
        """
        path = self.root / name
        mode = self.disk.status(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CorruptShardError(
                f"{path}: expected a file, found a pipe, a socket or a device.\nDelete it."
            )
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise CorruptShardError(
                f"{path}: a link that leads out of the cache, to {path.resolve()}.\n"
                "Copy the file here in its place, or delete the link."
            )
        return path

    def check_inside(self, name: str) -> None:
        """Raise `CorruptShardError` where the folder of this file is a link that leads out of the cache: what
        is written there would be refused when it is read.
        """
        folder = (self.root / name).parent
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise CorruptShardError(
                f"{folder}: a link that leads out of the cache, to {folder.resolve()}.\n"
                "Move the folder here in its place, or delete the link."
            )

    def free_bytes(self) -> int | None:
        """Bytes left on the disk that holds (or will hold) the folder; None where unknown."""
        return free_bytes(self.root)

    def check_writable(self, names: Iterable[str] = ("format.json",)) -> None:
        """Raise `StorageError` unless files of these names can be published.

        Where each would be, a folder is made, as a test, and removed. A file that is there already and
        belongs to another user cannot be replaced in a folder with the sticky bit.
        """
        for name in names:
            target = self.root / name
            self.check_inside(name)
            with storage_errors("write", self.root if name == MARKER else target):
                existing = next(folder for folder in target.absolute().parents if folder.exists())
                probe = existing / f".{secrets.token_hex(8)}.tmp"
                self.disk.make_folder(probe)
                self.disk.remove_folder(probe)
                if existing == target.parent.absolute() and not _may_replace(target):
                    raise PermissionError(errno.EPERM, "another user's file, in a folder with the sticky bit")

    # -- publishing ------------------------------------------------------------------------------------

    def _publish(self, target: Path, content: bytes) -> None:
        scratch = target.with_name(f".{secrets.token_hex(8)}.tmp")  # no longer than any published name
        self._make_folder(target.parent)
        try:
            self._write(scratch, content)
            self._sync_folders(target.parent)
            self.disk.rename(scratch, target)
        except BaseException:
            with suppress(OSError):  # the first refusal is the one to report
                self.disk.unlink(scratch)
            raise
        self.disk.sync_folder(target.parent)
        self._had_marker |= target == self.root / MARKER
        self._check_marker(target)  # again: it may have been written below the mount point

    def _write(self, scratch: Path, content: bytes) -> None:
        descriptor = self.disk.create(scratch)
        try:
            self.disk.write(descriptor, content)
            self.disk.sync_file(descriptor)
        finally:
            self.disk.close(descriptor)

    def _make_folder(self, folder: Path) -> None:
        status = self._status(folder)
        if status is not None and stat.S_ISDIR(status.st_mode):
            return
        if status is None and folder.parent != folder:
            self._make_folder(folder.parent)
        try:
            self.disk.make_folder(folder)
            self._synced.clear()
        except FileExistsError:
            if not folder.is_dir():  # else another writer was faster
                raise

    def _remove_empty_folders(self, file: Path) -> None:
        """Remove the folders above a file that is gone, as far as they are empty."""
        for parent in file.parents:
            if parent == self.root:
                break
            try:
                self.disk.remove_folder(parent)  # not synced: that an empty folder comes back does no harm
            except OSError:  # not empty, or gone
                break

    def _sync_folders(self, folder: Path) -> None:
        """Sync the folder and, the first time, those above it: any process may just have made one of them."""
        self.disk.sync_folder(folder)
        if folder in self._synced:
            return
        root, place = Path(os.path.realpath(self.root)), Path(os.path.realpath(folder))
        while not os.path.ismount(place) and place != place.parent:
            place = place.parent
            try:
                self.disk.sync_folder(place)
            except PermissionError:
                if place.is_relative_to(root):
                    raise  # above the cache it is a folder of others, which may be used but not read
        self._synced.add(folder)

    def _check_marker(self, target: Path) -> None:
        """Raise `StorageError` where the cache has vanished: another disk's folder may now be at its path."""
        is_there = self._status(self.root / MARKER) is not None
        if self._had_marker and not is_there:
            raise StorageError(
                f"cannot write {target}: {self.root} was a cache a moment ago and has no {MARKER} now.\n"
                "If its disk was unmounted, mount it again and run the same command again; what was "
                "published is kept there."
            )
        self._had_marker = is_there

    # -- looking ---------------------------------------------------------------------------------------

    def _status(self, path: Path) -> os.stat_result | None:
        """None where there is no such file or folder. Other refusals are raised: the disk gave no answer."""
        with _absent(), suppress(NotADirectoryError):
            return self.disk.status(path)
        return None

    def _log_closed(self, folder: Path, error: OSError) -> None:
        if folder not in self._closed:
            self._closed.add(folder)
            log_remark(f"{folder} is left out: it cannot be listed ({error.strerror or error}).")

    def _sizes(self, folder: Path, *, hidden: bool) -> dict[str, int]:
        """Sizes of the files below the folder by their names, sorted: either of dot-files and of files in
        dot-folders, or of all others.
        """
        sizes = {
            path.relative_to(self.root).as_posix(): status.st_size for path, status in self._walk(folder)
        }
        return {
            name: sizes[name]
            for name in sorted(sizes)
            if any(part.startswith(".") for part in name.split("/")) == hidden
        }

    def _walk(self, folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """Every file below the folder, without those behind links to folders, those removed meanwhile, and
        those in folders below that this user may not list.
        """
        try:
            entries = sorted(self.disk.entries(folder), key=lambda entry: entry.name)
        except FileNotFoundError:
            return
        except PermissionError as error:
            if folder == self.root:
                raise
            self._log_closed(folder, error)
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(folder / entry.name)
            elif not _leads_to_folder(entry):
                with suppress(FileNotFoundError):
                    yield folder / entry.name, entry.stat(follow_symlinks=False)


@contextmanager
def _absent() -> Iterator[None]:
    """Go on after the block where a file or folder is not there, or is a link that leads to itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to what this user may not see
        return False


def _may_replace(path: Path) -> bool:
    """Return whether the folder's sticky bit lets this user replace the file, if there is one."""
    if not hasattr(os, "geteuid") or not os.path.lexists(path):
        return True
    file, folder = path.lstat(), path.parent.stat()
    return not folder.st_mode & stat.S_ISVTX or os.geteuid() in (0, file.st_uid, folder.st_uid)


def free_bytes(folder: Path) -> int | None:
    """Bytes left on the disk that holds (or will hold) the folder; None of a file system without a size, such
    as /proc.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else None
