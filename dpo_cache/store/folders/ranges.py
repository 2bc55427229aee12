"""A remote file that is read by ranges: a footer or a column costs its own bytes, not those of the file."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

# the first request reads so much of a file's end: nearly every footer, or a whole small file
TAIL_BYTES = 64 << 10
GAP_BYTES = 64 << 10  # between two ranges, which are one request

Range = tuple[int, int]  # first byte, and the one after the last


class RangeFile(io.RawIOBase):
    """A file of `size` bytes, of which the last ones are `tail`. `read_range(start, end)` requests others.

    Holds only the tail and the ranges that were loaded last.
    """

    def __init__(self, size: int, tail: bytes, read_range: Callable[[int, int], bytes]):
        self._size, self._read_range, self._at = size, read_range, 0
        self._tail = (size - len(tail), tail)
        self._loaded: list[tuple[int, bytes]] = []

    def load(self, ranges: Sequence[Range]) -> None:
        """Request these ranges now, those near each other together; reading them costs no further request."""
        wanted = [(start, min(end, self._tail[0])) for start, end in ranges if start < self._tail[0]]
        self._loaded = [(start, self._read_range(start, end)) for start, end in join_ranges(wanted)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        pieces = []
        while self._at < end:
            pieces.append(self._read_some(end))
            self._at += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_some(self, end: int) -> bytes:
        """Some bytes from the current position on, at least one."""
        for start, content in (*self._loaded, self._tail):
            if start <= self._at < start + len(content):
                return content[self._at - start : end - start]
        self.load([(self._at, end)])
        return self._read_some(end)


def join_ranges(ranges: Sequence[Range]) -> list[Range]:
    """The ranges in order, those joined that overlap or have at most `GAP_BYTES` between them."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= GAP_BYTES:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
