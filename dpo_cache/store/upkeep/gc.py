"""Garbage: unneeded files of a cache, found, shown and removed. Others may read and write meanwhile.

A file is removed only after its replacement is durable, and a file younger than a grace period is no garbage:
a writer publishes parts before the manifest that names them, and scores before the pair set that needs them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, part_files
from dpo_cache.store.format.parquet import name_by_content, open_unverified, write_parquet
from dpo_cache.store.format.shards import SHARD_SCHEMA, keys_of, read_shard
from dpo_cache.store.upkeep.compact import keys_in
from dpo_cache.store.upkeep.contents import classify, read_manifests, shard_files
from dpo_cache.store.upkeep.repair import QUARANTINE

GRACE_S = 3600.0
REMOVAL_ORDER = ["manifest", "part", "shard", "unknown", "reference"]


@dataclass(frozen=True)
class Garbage:
    """A file that nothing needs, and why. With `unused_rows` only these rows are removed: the others are
    published as a new file first.
    """

    file: str
    bytes: int
    why: str
    unused_rows: int | None = None


def find_garbage(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> list[Garbage]:
    """Parts that no manifest names; references that no pair set was scored by and that are not in `keep`
    (ids, their first characters, or pair sets); scratch of killed writers; files set aside by `verify
    --repair`; with `scores` also the scores of completions that no pair set holds.

    Files written less than `grace_s` seconds ago are left out. Raises `CorruptShardError` where a manifest is
    damaged, because its parts are unknown.
    """
    folder, files, manifests = cache.folder, cache.folder.files(), read_manifests(cache)
    named = {file for manifest in manifests.values() for file in part_files(manifest)}
    needed = {manifest["reference"] for manifest in manifests.values()} | {
        cache.find_reference(name)
        for name in keep
        if not any(pair_set == name or pair_set.startswith(f"{name}/") for pair_set in manifests)
    }
    found, unneeded = [], dict[str, list[str]]()
    for file in files:
        kind, parts = classify(file)
        if kind == "part" and file not in named:
            found.append(Garbage(file, files[file], "no manifest names it"))
        elif kind in ("reference", "shard") and parts[0] not in needed:
            unneeded.setdefault(parts[0], []).append(file)
    for of_reference in unneeded.values():
        if not any(_is_young(folder, file, grace_s) for file in of_reference):
            why = "no pair set was scored by its reference"
            found += [Garbage(file, files[file], why) for file in of_reference]
    for reference_id in sorted(needed) if scores else ():
        found += _unused_scores(folder, reference_id, manifests)
    for file, size in folder.hidden().items():
        if file.startswith(f"{QUARANTINE}/"):
            found.append(Garbage(file, size, "set aside by `dpo-cache verify --repair`"))
        elif file.endswith(".tmp") and ("/" not in file or file.startswith(("references/", "pairs/"))):
            found.append(Garbage(file, size, "scratch of a writer that was killed"))
    return [entry for entry in found if not _is_young(folder, entry.file, grace_s)]


def collect_garbage(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> list[Garbage]:
    """Remove the files that `find_garbage` finds twice in a row: a file that is needed by then stays. Returns
    the removed ones.
    """
    planned = find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s)
    again = find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s)
    going = sorted({*planned} & {*again}, key=lambda entry: removal_order(entry.file))
    in_part = {classify(entry.file)[1][0] for entry in going if entry.unused_rows is not None}
    used = {entry: _used_keys(cache.folder, entry, read_manifests(cache)) for entry in in_part}
    for entry in going:
        if entry.unused_rows is not None:
            _publish_used(cache.folder, entry.file, used[classify(entry.file)[1][0]])
        cache.folder.remove(entry.file)
    return going


def removal_order(file: str) -> tuple[int, str]:
    """Sorts files so that an interrupted removal leaves a valid cache: manifests first, entries of references
    last.
    """
    return REMOVAL_ORDER.index(classify(file)[0]), file


def _is_young(folder: Folder, file: str, grace_s: float) -> bool:
    """Whether a writer may be about to need the file. Without a time of its own, a file is young unless
    `grace_s` is 0.
    """
    if grace_s <= 0:
        return False
    modified = folder.modified(file)
    return modified is None or time.time() - modified < grace_s


def _unused_scores(folder: Folder, reference_id: str, manifests: dict[str, Document]) -> Iterator[Garbage]:
    used = _used_keys(folder, reference_id, manifests)
    for shard, size in shard_files(folder, reference_id).items():
        keys = keys_in(folder, shard)
        num_unused = int((~np.isin(keys, used)).sum())
        if num_unused == len(keys):
            yield Garbage(shard, size, f"no pair set holds its {num_unused} completions")
        elif num_unused:
            why = f"no pair set holds {num_unused} of its {len(keys)} completions (the rest is kept)"
            yield Garbage(shard, size * num_unused // len(keys), why, num_unused)


def _used_keys(folder: Folder, reference_id: str, manifests: dict[str, Document]) -> np.ndarray:
    """Keys of all completions in pair sets scored by the reference, S16, sorted."""
    found = [np.empty(0, "S16")]
    for manifest in manifests.values():
        for file in part_files(manifest) if manifest["reference"] == reference_id else ():
            with open_unverified(folder, file, PAIR_SCHEMA) as reader:
                for table in reader.read_groups(["chosen_key", "rejected_key"]):
                    found += map(keys_of, table.columns)
    return np.unique(np.concatenate(found))


def _publish_used(folder: Folder, shard: str, used: np.ndarray) -> None:
    """Publish the rows of a shard whose keys are used, as a new shard."""
    tables = [
        table.filter(pa.array(np.isin(keys_of(table.column("key")), used)))
        for table in read_shard(folder, shard)
    ]
    kept = pa.concat_tables(tables)
    content = write_parquet(kept.cast(SHARD_SCHEMA), row_group_size=max(map(len, tables)))
    folder.publish(f"{shard.rpartition('/')[0]}/{name_by_content(content)}", content)
