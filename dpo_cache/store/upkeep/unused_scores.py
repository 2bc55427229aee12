"""Scores of completions that no pair set holds: found by the keys of shards and parts, range by range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_cache.errors import StorageError, first_line
from dpo_cache.log import log_remark
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import part_files
from dpo_cache.store.format.shards import SHARD_SCHEMA, keys_of
from dpo_cache.store.upkeep.contents import classify, count_rows, shard_files
from dpo_cache.store.upkeep.key_ranges import key_starts, rows_by_key
from dpo_cache.store.upkeep.merge_shards import write_sorted_shards
from dpo_cache.store.upkeep.named_files import read_named_files
from dpo_cache.store.upkeep.open_runs import shards_of_runs


@dataclass(frozen=True)
class UnusedScores:
    """A shard, its size, its completions, and those of them that no pair set holds: at least one."""

    shard: str
    bytes: int
    num_rows: int
    num_unused: int


def find_unused_scores(
    folder: Folder, reference_id: str, manifests: dict[str, Document]
) -> list[UnusedScores]:
    """The reference's shards with completions that none of the pair sets holds. Shards of runs that are at
    work, and those that cannot be read, are left out, the latter with a remark.
    """
    sizes = shard_files(folder, reference_id)
    try:
        held = shards_of_runs(folder, reference_id)  # after the shards were listed
        shards = _readable_shards(folder, sorted(sizes.keys() - held))
        counts = _count_unused(folder, _parts_of(reference_id, manifests), shards)
    except StorageError as error:
        _log_left(folder, f"all scores of reference {reference_id[:12]} stay", error)
        return []
    return [
        UnusedScores(shard, sizes[shard], num_rows, num_unused)
        for shard, (num_rows, num_unused) in zip(shards, counts, strict=True)
        if num_unused
    ]


def publish_used_rows(folder: Folder, files: Sequence[str]) -> None:
    """Publish the rows of these shards whose completions pair sets hold, as new, sorted shards."""
    manifests = read_named_files(folder).manifests if files else {}
    shards: dict[str, list[str]] = {}
    for file in files:
        shards.setdefault(classify(file)[1][0], []).append(file)
    for reference_id, of_reference in shards.items():
        parts, place = _parts_of(reference_id, manifests), f"references/{reference_id}/scores"
        rank = last_rank = 0
        while rank <= last_rank:  # once, unless several of the shards hold one completion: each value stays
            kept = _RowsOfRank(folder, parts, of_reference, rank)
            for _ in write_sorted_shards(folder, place, kept):
                pass
            rank, last_rank = rank + 1, kept.most_of_a_key - 1


def _parts_of(reference_id: str, manifests: dict[str, Document]) -> list[str]:
    """The parts of all pair sets scored by the reference."""
    named = [part_files(manifest) for manifest in manifests.values() if manifest["reference"] == reference_id]
    return sorted(set().union(*named))


def _readable_shards(folder: Folder, shards: Sequence[str]) -> list[str]:
    """The shards without those that others removed meanwhile, or that this user may not read."""
    readable = []
    for shard in shards:
        try:
            count_rows(folder, shard)
        except StorageError as error:
            if folder.exists(shard):  # else it was compacted meanwhile
                _log_left(folder, f"{shard} stays", error)
            continue
        readable.append(shard)
    return readable


def _count_unused(folder: Folder, parts: Sequence[str], shards: Sequence[str]) -> list[tuple[int, int]]:
    """The rows of each shard, and those of completions that no part holds."""
    if not shards:
        return []
    sources = [(folder, file) for file in (*parts, *shards)]
    num_rows, num_unused = np.zeros((2, len(sources)), np.int64)
    for table in rows_by_key(sources, only_keys=len(sources)):
        source = table.column("source").to_numpy()
        num_rows += np.bincount(source, minlength=len(sources))
        num_unused += np.bincount(source[~_is_used(table, len(parts))], minlength=len(sources))
    return list(zip(num_rows[len(parts) :].tolist(), num_unused[len(parts) :].tolist(), strict=True))


def _is_used(table: pa.Table, num_parts: int) -> np.ndarray:
    """Return whether each row of `rows_by_key` is of a completion that one of the first `num_parts` files
    holds.
    """
    _, first = key_starts(keys_of(table.column("key")))
    return table.column("source").to_numpy()[first] < num_parts


class _RowsOfRank:
    """For the shards' completions that a part holds, the row in the first shard (`rank` 0), the second one, …
    that has the completion, as tables for `write_sorted_shards`.
    """

    def __init__(self, folder: Folder, parts: list[str], shards: list[str], rank: int):
        self._sources = [(folder, file) for file in (*parts, *shards)]
        self._num_parts, self._rank = len(parts), rank
        self.most_of_a_key = 0  # rows, known at the end

    def __iter__(self) -> Iterator[pa.Table]:
        for table in rows_by_key(self._sources, only_keys=self._num_parts, is_hashed=True):
            is_of_shard = table.column("source").to_numpy() >= self._num_parts
            kept = table.filter(pa.array(is_of_shard & _is_used(table, self._num_parts)))
            _, first = key_starts(keys_of(kept.column("key")))
            rank = np.arange(len(kept)) - first
            self.most_of_a_key = max(self.most_of_a_key, int(rank.max(initial=-1)) + 1)
            yield kept.select(SHARD_SCHEMA.names).filter(pa.array(rank == self._rank))


def _log_left(folder: Folder, what: str, error: StorageError) -> None:
    log_remark(f"{folder}: {what}: {first_line(error)}")
