"""The parts of a pair set: checks that they exist, and their bytes while the pair set is written."""

from __future__ import annotations

import io
import tempfile
import weakref
from typing import BinaryIO

from dpo_cache.errors import CorruptShardError, MissingFileError, StorageError
from dpo_cache.store.folders.folder import Folder, LocalFolder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA
from dpo_cache.store.format.parquet import open_verified

KEPT_BYTES = 64 * 2**20  # most bytes of written parts in memory; the rest is in a temporary file


def has_part(folder: Folder, place: str, part: Document) -> bool:
    """Return whether the folder `place` has a file of the part's name and size: no pipe, and no link that
    leads out of the cache. `part` is the manifest's entry. Raises `StorageError` where the disk or store
    gives no answer.
    """
    try:
        return folder.size(f"{place}/{part['file']}") == part["bytes"]
    except (MissingFileError, CorruptShardError):
        return False


def holds_part(folder: Folder, place: str, part: Document) -> bool:
    """The same, and on a disk also whether this user may read the file and its bytes hash to its name."""
    if not has_part(folder, place, part):
        return False
    if not isinstance(folder, LocalFolder):
        return True  # stores check what they keep, and reading would fetch all of it
    try:
        with open_verified(folder, f"{place}/{part['file']}", PAIR_SCHEMA):
            return True
    except (MissingFileError, CorruptShardError):
        return False
    except StorageError as error:
        if error.is_denied:  # another user's file: one's own replaces it
            return False
        raise


class KeptParts:
    """The bytes of parts by their names: the first `KEPT_BYTES` in memory, more in a temporary file. Where
    that cannot be written, nothing is kept.
    """

    def __init__(self) -> None:
        self._in_memory: dict[str, bytes] = {}
        self._in_file: dict[str, tuple[int, int]] = {}  # where each begins, and its length
        self._file: BinaryIO | None = None
        self._is_closed = False

    def __contains__(self, name: str) -> bool:
        return name in self._in_memory or name in self._in_file

    def add(self, name: str, content: bytes) -> None:
        """Keep the part."""
        if self._is_closed or name in self:
            return
        if sum(map(len, self._in_memory.values())) + len(content) <= KEPT_BYTES:
            self._in_memory[name] = content
            return
        try:
            file = self._open_file()
            start = file.seek(0, io.SEEK_END)
            file.write(content)
            file.flush()
        except OSError:
            self.close()
        else:
            self._in_file[name] = start, len(content)

    def read(self, name: str) -> bytes:
        """The bytes of a part that is kept."""
        if name in self._in_memory:
            return self._in_memory[name]
        start, num_bytes = self._in_file[name]
        file = self._open_file()
        file.seek(start)
        return file.read(num_bytes)

    def close(self) -> None:
        """Forget all parts; later ones are not kept."""
        self._is_closed = True
        self._in_memory.clear()
        self._in_file.clear()
        if self._file is not None:
            self._file.close()

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
            weakref.finalize(self, self._file.close)  # if the writer never finishes
        return self._file
