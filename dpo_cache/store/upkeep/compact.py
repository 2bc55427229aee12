"""Many small score shards merged into few large ones. Writers and readers may be at work at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpo_cache.errors import CorruptShardError, NotInCacheError, StorageError, first_line
from dpo_cache.log import log_remark
from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.keys import is_sorted
from dpo_cache.store.format.shards import ROW_BYTES, read_keys
from dpo_cache.store.upkeep.compare import allowed_gap, compare_files
from dpo_cache.store.upkeep.contents import count_rows, shard_files, with_new_plans
from dpo_cache.store.upkeep.merge_shards import SHARD_BYTES, merge_shards, write_sorted_shards
from dpo_cache.store.upkeep.open_runs import shards_of_runs
from dpo_cache.store.upkeep.removal import remove_unneeded


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
    left: int = 0  # shards of runs that are at work, or were killed in an audit; counted nowhere else


def compact_reference(cache: Cache, reference_id: str) -> Compacted:
    """Merge the reference's score shards into few large ones, sorted by key; a compact cache is not changed.

    The new shards are durable before the old ones are removed; a crash leaves both, which is legal, and the
    next run finishes the work. Shards that others publish meanwhile stay as they are, and so do those of runs
    of `precompute` that may yet withdraw them. Shards that this user may not read or not remove are left,
    with a remark. Memory: 16 bytes a completion, and a shard. Raises `CorruptShardError` where a shard is
    damaged, or where shards disagree on a completion.
    """
    return with_new_plans(lambda: _compact(cache, reference_id))


def _compact(cache: Cache, reference_id: str) -> Compacted:
    folder, place = cache.folder, f"references/{reference_id}/scores"
    every = shard_files(folder, reference_id)
    held = shards_of_runs(folder, reference_id) & every.keys()
    sizes = {shard: size for shard, size in every.items() if shard not in held}
    keys = _read_keys(folder, sorted(sizes))
    sizes = {shard: sizes[shard] for shard in keys}
    shards, bytes_before = sorted(sizes), sum(sizes.values())
    num_rows = sum(map(len, keys.values()))
    if _is_compact(folder, keys):
        num_shards = len(shards)
        return Compacted(
            reference_id, num_shards, num_shards, bytes_before, bytes_before, num_rows, 0, len(held)
        )
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
    _check_entry(folder, reference_id, set(merged) - every.keys())
    replaced = sizes.keys() - set(merged)
    remove_unneeded(folder, replaced, always=replaced).log(folder)
    bytes_after = sum(map(folder.size, merged))
    duplicates = num_rows - distinct
    return Compacted(
        reference_id,
        len(shards),
        len(merged),
        bytes_before,
        bytes_after,
        distinct,
        duplicates,
        len(held),
    )


def _check_entry(folder: Folder, reference_id: str, new: set[str]) -> None:
    """Raise `NotInCacheError`, and remove the new shards, if others removed the reference meanwhile."""
    if not folder.exists(f"references/{reference_id}/reference.json"):
        for shard in new:
            folder.remove(shard)
        raise NotInCacheError(
            f"{folder}: reference {reference_id} was removed while it was compacted.\n"
            "Run `dpo-cache ls` to see what is left."
        )


def keys_in(folder: Folder, shard: str) -> np.ndarray:
    """Keys of a shard's rows, S16, in their order."""
    return np.concatenate([*read_keys(folder, shard), np.empty(0, "S16")])


def _read_keys(folder: Folder, shards: list[str]) -> dict[str, np.ndarray]:
    """The keys of the shards that this user may read."""
    keys: dict[str, np.ndarray] = {}
    for shard in shards:
        try:
            keys[shard] = keys_in(folder, shard)
        except StorageError as error:
            if not error.is_denied:
                raise
            log_remark(f"{folder}/{shard} is not compacted: {first_line(error)}")
    return keys


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
