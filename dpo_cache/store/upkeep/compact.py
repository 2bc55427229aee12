"""Many small score shards merged into few large ones. Writers and readers may be at work at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.keys import is_sorted
from dpo_cache.store.format.shards import ROW_BYTES, read_keys
from dpo_cache.store.upkeep.compare import allowed_gap, compare_files
from dpo_cache.store.upkeep.contents import count_rows, shard_files
from dpo_cache.store.upkeep.merge_shards import SHARD_BYTES, merge_shards, write_sorted_shards


@dataclass(frozen=True)
class Compacted:
    """The shards of one reference before and after."""

    reference: str
    shards_before: int
    shards_after: int
    bytes_before: int
    bytes_after: int
    completions: int
    duplicates: int  # rows of completions that another shard held, too


def compact_reference(cache: Cache, reference_id: str) -> Compacted:
    """Merge the reference's score shards into few large ones, sorted by key; a compact cache is not changed.

    The new shards are durable before the old ones are removed; a crash leaves both, which is legal, and the
    next run finishes the work. Shards that others publish meanwhile stay as they are. Memory: 16 bytes a
    completion, and a shard. Raises `CorruptShardError` where a shard is damaged, or where shards disagree on
    a completion.
    """
    folder, place = cache.folder, f"references/{reference_id}/scores"
    sizes = shard_files(folder, reference_id)
    shards, bytes_before = sorted(sizes), sum(sizes.values())
    keys = {shard: keys_in(folder, shard) for shard in shards}
    num_rows = sum(map(len, keys.values()))
    if _is_compact(folder, keys):
        return Compacted(reference_id, len(shards), len(shards), bytes_before, bytes_before, num_rows, 0)
    distinct = len(np.unique(np.concatenate(list(keys.values()))))
    if distinct < num_rows:
        _check_agreement(cache, reference_id, shards)
    del keys
    merged = [f"{place}/{name}" for name in write_sorted_shards(folder, place, merge_shards(folder, shards))]
    written = sum(count_rows(folder, shard)[0] for shard in merged)
    if written != distinct:
        raise CorruptShardError(
            f"{folder}/{place}: {distinct} completions to merge, {written} written. Nothing was removed: "
            "run `dpo-cache verify`."
        )
    for shard in sizes.keys() - set(merged):
        folder.remove(shard)
    bytes_after = sum(map(folder.size, merged))
    duplicates = num_rows - distinct
    return Compacted(reference_id, len(shards), len(merged), bytes_before, bytes_after, distinct, duplicates)


def keys_in(folder: Folder, shard: str) -> np.ndarray:
    """Keys of a shard's rows, S16, in their order."""
    return np.concatenate([*read_keys(folder, shard), np.empty(0, "S16")])


def _is_compact(folder: Folder, keys: dict[str, np.ndarray]) -> bool:
    """Whether every shard is sorted, no two overlap, and all but the last have `SHARD_BYTES`."""
    if not all(len(of_shard) and is_sorted(of_shard) for of_shard in keys.values()):
        return False
    in_order = sorted(keys, key=lambda shard: bytes(keys[shard][0]).ljust(16, b"\0"))
    is_apart = all(keys[one][-1] < keys[other][0] for one, other in pairwise(in_order))
    return is_apart and all(_memory_bytes(folder, shard) >= SHARD_BYTES for shard in in_order[:-1])


def _memory_bytes(folder: Folder, shard: str) -> int:
    num_rows, num_tokens = count_rows(folder, shard)
    return num_rows * ROW_BYTES + num_tokens * 4


def _check_agreement(cache: Cache, reference_id: str, shards: list[str]) -> None:
    """Raise `CorruptShardError` where two shards have different values of a completion."""
    allowed = allowed_gap(cache.read_reference(reference_id)["identity"])
    num_bytes = sum(4 * count_rows(cache.folder, shard)[1] for shard in shards)
    for apart in compare_files(cache.folder, shards, [], allowed, num_bytes):
        raise CorruptShardError(
            f"{cache}/{apart.file}: {apart.num_completions} completions differ from {apart.other} "
            f"by up to {apart.largest_gap:.2g} nats a token (allowed {allowed:g}).\n"
            f"Nothing was changed. Run `dpo-cache verify {cache}` to see all of it."
        )
