"""Check that the disk has space for the output of a run."""

from __future__ import annotations

from dpo_cache.errors import StorageError, shown_bytes
from dpo_cache.store import Cache

BYTES_PER_TOKEN = 13  # 4 for the id, 4 for the log-prob twice (scores and pairs), and some slack


def check_disk(cache: Cache, data_tokens: int) -> None:
    """Raise `StorageError` if scores and pairs of so many tokens do not fit, before hours of scoring."""
    free = cache.folder.free_bytes()
    needed = BYTES_PER_TOKEN * data_tokens
    if free is not None and needed > free:
        raise StorageError(
            f"{cache}: about {shown_bytes(needed)} are needed, {shown_bytes(free)} are free.\n"
            "Free some space, choose another cache, or score fewer rows at once."
        )
