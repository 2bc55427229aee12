"""Whether what a run writes has room on the disk."""

from __future__ import annotations

from dpo_cache.errors import StorageError
from dpo_cache.store import Cache


def check_disk(cache: Cache, data_tokens: int) -> None:
    """Raise `StorageError` before hours of scoring that could not be written."""
    free = cache.folder.free_bytes()
    needed = 13 * data_tokens  # 4 bytes an id, 4 a log-prob twice (scores and pairs), and some slack
    if free is not None and needed > free:
        raise StorageError(
            f"{cache}: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.\n"
            "Free some space, choose another --cache, or score less at once with --limit."
        )
