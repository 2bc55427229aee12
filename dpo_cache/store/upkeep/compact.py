"""Many small score shards merged into few large ones. Writers and readers may be at work at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.keys import is_sorted
from dpo_cache.store.format.shards import ROW_BYTES, open_shard, read_keys
from dpo_cache.store.upkeep.compare import allowed_gap, compare_files
from dpo_cache.store.upkeep.contents import classify, count_rows
from dpo_cache.store.upkeep.merge_shards import SHARD_BYTES, merge_shards, write_sorted_shards

# -- compact -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compacted:
    """What became of one reference's shards."""

    reference: str
    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    completions: int
    duplicates: int  # rows of completions that another shard held, too


def compact_reference(cache: Cache, reference_id: str) -> Compacted:
    """Merge the reference's score shards into few large ones, sorted by key; a cache that is compact already
    is left alone.

    The new shards are durable before the old ones are removed; a crash leaves both, which is legal, and the
    next run ends the work. Shards that others publish meanwhile are left as they are. Memory: 16 bytes a
    completion, and a shard. Raises `CorruptShardError` where a shard is damaged, or where shards disagree on
    a completion.
    """
    folder, place = cache.folder, f"references/{reference_id}/scores"
    sizes = {
        name.rpartition("/")[2]: size
        for name, size in folder.files(place).items()
        if classify(name)[0] == "shard"
    }
    names = sorted(sizes)
    keys = {name: keys_in(folder, place, name) for name in names}
    num_rows = sum(map(len, keys.values()))
    before = len(names), sum(sizes.values())
    if _is_compact(folder, place, keys):
        return Compacted(reference_id, before[0], before[0], before[1], before[1], num_rows, 0)
    distinct = len(np.unique(np.concatenate(list(keys.values()))))
    if distinct < num_rows:
        _check_agreement(cache, reference_id, [f"{place}/{name}" for name in names])
    del keys
    merged = list(write_sorted_shards(folder, place, merge_shards(folder, place, names)))
    written = sum(count_rows(folder, f"{place}/{name}")[0] for name in merged)
    if written != distinct:
        raise CorruptShardError(
            f"{folder}/{place}: {distinct} completions to merge, {written} written. Nothing was removed: "
            "run `dpo-cache verify`."
        )
    for name in names:
        if name not in merged:
            folder.remove(f"{place}/{name}")
    after = sum(folder.size(f"{place}/{name}") for name in merged)
    return Compacted(reference_id, before[0], len(merged), before[1], after, distinct, num_rows - distinct)


def keys_in(folder: Folder, place: str, name: str) -> np.ndarray:
    """Keys of a shard's rows, S16, in their order."""
    reader = open_shard(folder, place, name)
    try:
        return np.concatenate([*read_keys(reader), np.empty(0, "S16")])
    finally:
        reader.close()


def _is_compact(folder: Folder, place: str, keys: dict[str, np.ndarray]) -> bool:
    """Whether every shard is sorted, no two overlap, and all but the last are as large as they get."""
    if not all(len(of_shard) and is_sorted(of_shard) for of_shard in keys.values()):
        return False
    in_order = sorted(keys, key=lambda name: bytes(keys[name][0]).ljust(16, b"\0"))
    apart = all(keys[one][-1] < keys[other][0] for one, other in pairwise(in_order))
    return apart and all(_held_bytes(folder, f"{place}/{name}") >= SHARD_BYTES for name in in_order[:-1])


def _held_bytes(folder: Folder, name: str) -> int:
    num_rows, num_tokens = count_rows(folder, name)
    return num_rows * ROW_BYTES + num_tokens * 4


def _check_agreement(cache: Cache, reference_id: str, shards: list[str]) -> None:
    """Raise `CorruptShardError` where a completion that stands twice has two values."""
    allowed = allowed_gap(cache.read_reference(reference_id)["identity"])
    num_bytes = sum(4 * count_rows(cache.folder, name)[1] for name in shards)
    for apart in compare_files(cache.folder, shards, [], allowed, num_bytes):
        raise CorruptShardError(
            f"{cache}/{apart.file}: {apart.num_completions} completions differ from {apart.other} "
            f"by up to {apart.largest_gap:.2g} nats a token (allowed {allowed:g}).\n"
            f"Nothing was changed. Run `dpo-cache verify {cache}` to see all of it."
        )


# -- gc ------------------------------------------------------------------------------------------------


# -- rm ------------------------------------------------------------------------------------------------
