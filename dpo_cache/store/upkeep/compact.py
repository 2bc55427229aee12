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
from dpo_cache.store.format.page_limits import Footer
from dpo_cache.store.format.parquet import open_unverified
from dpo_cache.store.format.shards import ROW_BYTES, SHARD_SCHEMA, group_bounds, read_keys
from dpo_cache.store.upkeep.compare import allowed_gap, compare_files
from dpo_cache.store.upkeep.contents import count_rows, shard_files, with_new_plans
from dpo_cache.store.upkeep.key_ranges import find_overlap
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
    with a remark. Raises `CorruptShardError` where a shard is damaged, or where shards disagree on a
    completion. Time grows with the completions; memory: a shard, and a range of keys (`key_ranges.py`).
    """
    return with_new_plans(lambda: _compact(cache, reference_id))


def _compact(cache: Cache, reference_id: str) -> Compacted:
    folder, place = cache.folder, f"references/{reference_id}/scores"
    every = shard_files(folder, reference_id)
    held = shards_of_runs(folder, reference_id) & every.keys()
    footers = _read_footers(folder, sorted(every.keys() - held))
    shards, bytes_before = sorted(footers), sum(every[shard] for shard in footers)
    num_rows = sum(footer.num_rows for footer in footers.values())
    if _is_compact(folder, footers):
        num_shards = len(shards)
        return Compacted(
            reference_id, num_shards, num_shards, bytes_before, bytes_before, num_rows, 0, len(held)
        )
    distinct = _check_agreement(cache, reference_id, shards)
    merged = [f"{place}/{name}" for name in write_sorted_shards(folder, place, merge_shards(folder, shards))]
    written = sum(count_rows(folder, shard)[0] for shard in merged)
    if written != distinct:
        raise CorruptShardError(
            f"{folder}/{place}: {distinct} completions to merge, {written} written. Nothing was removed: "
            "run `dpo-cache verify`."
        )
    _check_entry(folder, reference_id, set(merged) - every.keys())
    replaced = footers.keys() - set(merged)
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


def _read_footers(folder: Folder, shards: list[str]) -> dict[str, Footer]:
    """The footers of the shards that this user may read."""
    footers: dict[str, Footer] = {}
    for shard in shards:
        try:
            with open_unverified(folder, shard, SHARD_SCHEMA, is_brief=True) as reader:
                footers[shard] = reader.footer
        except StorageError as error:
            if not error.is_denied:
                raise
            log_remark(f"{folder}/{shard} is not compacted: {first_line(error)}")
    return footers


def _is_compact(folder: Folder, footers: dict[str, Footer]) -> bool:
    """Return whether every shard is sorted, no two overlap, and all but the last have `SHARD_BYTES`. Keys are
    read only where the footers do not rule it out, those of one shard at a time.
    """
    bounds = {shard: group_bounds(footer) for shard, footer in footers.items()}
    ends = sorted(
        ((bytes(of_shard[0, 0]), bytes(of_shard[-1, 1])), shard)
        for shard, of_shard in bounds.items()
        if of_shard is not None
    )
    is_apart = len(ends) == len(footers) and all(
        last < first for ((_, last), _), ((first, _), _) in pairwise(ends)
    )
    return (
        is_apart
        and all(_memory_bytes(footers[shard]) >= SHARD_BYTES for _, shard in ends[:-1])
        and all(is_sorted(np.concatenate(read_keys(folder, shard))) for _, shard in ends)
    )


def _memory_bytes(footer: Footer) -> int:
    values = SHARD_SCHEMA.get_field_index("token_logps")
    return footer.num_rows * ROW_BYTES + 4 * sum(chunks[values].num_values for chunks in footer.chunks)


def _check_agreement(cache: Cache, reference_id: str, shards: list[str]) -> int:
    """The number of distinct completions. Raises `CorruptShardError` where two shards have different values
    of one.
    """
    overlap = find_overlap([(cache.folder, shard) for shard in shards])
    if not overlap.files:
        return overlap.num_keys
    allowed = allowed_gap(cache.read_reference(reference_id)["identity"])
    for apart in compare_files(cache.folder, [shards[place] for place in overlap.files], [], allowed):
        raise CorruptShardError(
            f"{cache}/{apart.file}: {apart.num_completions} completions differ from {apart.other} "
            f"by up to {apart.largest_gap:.2g} nats a token (allowed {allowed:g}).\n"
            f"Nothing was changed. Run `dpo-cache verify {cache}` to see all of it."
        )
    return overlap.num_keys
