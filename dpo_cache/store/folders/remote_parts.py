"""Parts of a remote cache: whole through their local copies, or some of them by ranges.

A part never changes, so its size as listed serves for good, and so does its end, which has the footer. The
ends of the parts that were read last are kept in memory; of a small part that is all of it.
"""

from __future__ import annotations

import io
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.folders.local_copies import WrongDigestError, hash_source, open_local_copies
from dpo_cache.store.folders.ranges import TAIL_BYTES, RangeFile

MEMORY_BYTES = 64 << 20  # a larger part that no copy is kept of is read into a temporary file
TAILS = 512  # ends of parts in memory: 32 MB

Pieces = Callable[[str, int, int], Iterator[bytes]]


class RemoteParts:
    """The parts of one remote folder.

    `find_size` requests the size of a file, `pieces(name, start, end)` yields its bytes.
    """

    def __init__(self, url: str, find_size: Callable[[str], int], pieces: Pieces):
        self._url, self._find_size, self._pieces = url, find_size, pieces
        self._copies = open_local_copies()
        self.sizes: dict[str, int] = {}  # in bytes, by name, as far as they are known
        self._tails: OrderedDict[str, bytes] = OrderedDict()

    def open_whole(self, name: str) -> pa.NativeFile:
        """The part, open for reading: a local copy or, where there is no room for one, its bytes in memory or
        in a temporary file, until it is closed.

        Raises `CorruptShardError` where the store's bytes do not hash to the name, twice.
        """
        try:
            with suppress(WrongDigestError):
                return self._open_once(name)
            self.forget(name)
            return self._open_once(name)
        except WrongDigestError as error:
            self.forget(name)
            raise CorruptShardError(
                f"{self._url}/{name}: its bytes do not hash to its name.\n"
                "The file was changed or damaged. Delete it and run the `dpo-cache precompute` that made "
                "it again: it scores only what is missing."
            ) from error

    def open_pinned(self, name: str) -> pa.NativeFile | None:
        """The same, to be open for long: None where there is no room for a local copy."""
        size = self._size(name)
        try:
            part = self._copies.open(_base(name), size, lambda file: self._download(name, size, file))
        except WrongDigestError:
            part = self.open_whole(name)  # raises, if the damage remains
        if part is not None and not self.keeps(name):
            part.close()
            return None
        return part

    def open_ranges(self, name: str, *, is_brief: bool) -> pa.NativeFile | RangeFile:
        """The local copy, where there is one, else a file that is read by ranges and not hashed; with
        `is_brief`, also instead of a copy that this process has not hashed yet.
        """
        copy = self._copies.open_held(_base(name), only_hashed=is_brief)
        if copy is not None:
            return copy
        size = self._size(name)
        tail = self._tails.get(name)
        if tail is None:
            tail = self._tails[name] = b"".join(self._pieces(name, max(0, size - TAIL_BYTES), size))
            if len(self._tails) > TAILS:
                self._tails.popitem(last=False)
        return RangeFile(size, tail, lambda start, end: b"".join(self._pieces(name, start, end)))

    def keeps(self, name: str) -> bool:
        """Return whether there is a local copy that was found whole."""
        return self._copies.holds(_base(name))

    def forget(self, name: str) -> None:
        """Forget what is known of a part that was removed or is damaged."""
        self.sizes.pop(name, None)
        self._tails.pop(name, None)

    def _size(self, name: str) -> int:
        size = self.sizes.get(name)
        if size is None:
            size = self.sizes[name] = self._find_size(name)
        return size

    def _open_once(self, name: str) -> pa.NativeFile:
        size = self._size(name)
        copy = self._copies.open(_base(name), size, lambda file: self._download(name, size, file))
        if copy is not None:
            return copy
        source = self._open_unkept(name, size)
        if f"{hash_source(source)}.parquet" != _base(name):
            source.close()
            raise WrongDigestError(name)
        return source

    def _open_unkept(self, name: str, size: int) -> pa.NativeFile:
        """The part's bytes, in memory or in a temporary file without a name."""
        if size <= MEMORY_BYTES:
            content = io.BytesIO()
            self._download(name, size, content)
            return pa.BufferReader(content.getvalue())
        descriptor, path = tempfile.mkstemp(prefix="dpo-cache-", suffix=".parquet")
        try:
            with open(descriptor, "wb") as file:
                self._download(name, size, file)
            return pa.OSFile(path)
        finally:
            with suppress(OSError):  # Windows removes no open file
                Path(path).unlink()

    def _download(self, name: str, size: int, file: BinaryIO) -> None:
        tail = self._tails.get(name, b"")
        for piece in (tail,) if len(tail) == size else self._pieces(name, 0, size):
            file.write(piece)


def _base(name: str) -> str:
    return name.rpartition("/")[2]
