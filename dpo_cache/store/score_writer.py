"""Publishing scores without an index: one that only writes needs to know no key that is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.parquet import name_by_content
from dpo_cache.store.format.shards import encode_shard
from dpo_cache.types import Score


def publish_scores(
    folder: Folder,
    place: str,
    scores: Sequence[tuple[bytes, Score]],
    record: Callable[[str], None] = lambda _: None,
) -> tuple[str, int]:
    """Store the scores as one new shard in the folder's `place`, durably. Returns its name there and its
    bytes.

    `record` is called before a shard is published that was not there, with its name from the root.
    """
    content = encode_shard(scores)
    name = name_by_content(content)
    if not folder.exists(f"{place}/{name}"):
        record(f"{place}/{name}")
    folder.publish(f"{place}/{name}", content)
    return name, len(content)
