"""The files that `verify` reads if it reads only a share of a cache each time, and others the next time.

A file's position is a number from 0 to 999,999, the remainder of a digest of its name, and a run reads the
files in an interval of positions. The next run begins where the last one ended, which `CACHE/.verified.json`
records for everybody who uses the cache. Without the record, or where it cannot be written, the day decides.
So ten runs of 10 % read every file once, whatever is published meanwhile.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from dpo_cache.errors import CacheError, StorageError, first_line
from dpo_cache.log import log_remark
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import read_sealed, seal_document

POSITIONS = 1_000_000
RECORD = ".verified.json"
DAY_S = 86_400


@dataclass(frozen=True)
class Subset:
    """The files whose positions are in an interval, which may pass the end and continue at 0."""

    start: int
    length: int

    def __contains__(self, file: str) -> bool:
        return (position(file) - self.start) % POSITIONS < self.length


def position(file: str) -> int:
    """The position of a file, by its name from the root of the cache."""
    return int.from_bytes(hashlib.sha256(file.encode()).digest()[:8], "big") % POSITIONS


def choose_subset(folder: Folder, share: float) -> Subset:
    """The files that the next run reads; `share` is above 0 and at most 1."""
    length = max(1, round(share * POSITIONS))
    start = _recorded_start(folder)
    return Subset(int(time.time() // DAY_S) * length % POSITIONS if start is None else start, length)


def record_subset(folder: Folder, subset: Subset) -> None:
    """Record that these files were read, so that the next run begins with others."""
    content = seal_document({"next": (subset.start + subset.length) % POSITIONS})
    try:
        folder.publish(RECORD, content)
    except StorageError as error:
        log_remark(
            f"the list of files that were read cannot be stored, so the day decides which files are next: "
            f"{first_line(error)}"
        )


def _recorded_start(folder: Folder) -> int | None:
    try:
        start = read_sealed(folder, RECORD).get("next")
    except CacheError:
        return None
    return start if type(start) is int and 0 <= start < POSITIONS else None
