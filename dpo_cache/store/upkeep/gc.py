"""Garbage: files that nothing needs any more, found, shown and removed. Writers and readers may be at work at
the same time.

Nothing is removed before what replaces it is durable, and nothing younger than a grace period counts as
garbage: a writer publishes parts before the manifest that names them, and scores before the pair set that
needs them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, read_manifest
from dpo_cache.store.format.parquet import ParquetReader, name_by_content, open_source, write_parquet
from dpo_cache.store.format.shards import SHARD_SCHEMA, keys_of, read_shard
from dpo_cache.store.upkeep.compact import keys_in
from dpo_cache.store.upkeep.contents import classify, find_pair_sets
from dpo_cache.store.upkeep.repair import QUARANTINE

GRACE_S = 3600.0


@dataclass(frozen=True)
class Garbage:
    """A file that nothing needs, and why. With `unused_rows` only these rows go, and the rest is written anew
    first.
    """

    file: str
    bytes: int
    why: str
    unused_rows: int | None = None


def find_garbage(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> list[Garbage]:
    """What could go: parts that no manifest names, references that no pair set was scored by and that are not
    in `keep` (ids, their first characters, or pair sets), scratch of killed writers, what `verify --repair`
    set aside; with `scores` also the scores of completions that no pair set holds.

    Nothing that was written less than `grace_s` seconds ago. Raises `CorruptShardError` where a manifest is
    damaged, for what it names is not known.
    """
    folder, files = cache.folder, cache.folder.files()
    manifests = {name: read_manifest(folder, f"pairs/{name}") for name in cache.pair_sets()}
    named = {
        f"pairs/{name}/{part['file']}" for name, manifest in manifests.items() for part in manifest["parts"]
    }
    needed = {manifest["reference"] for manifest in manifests.values()} | {
        _reference_kept(cache, name) for name in keep
    }
    found = [
        Garbage(file, files[file], "no manifest names it")
        for file in files
        if classify(file)[0] == "part" and file not in named
    ]
    for reference_id in sorted(
        {classify(file)[1][0] for file in files if classify(file)[0] in ("reference", "shard")} - needed
    ):
        of_reference = [
            file
            for file in files
            if file.startswith(f"references/{reference_id}/") and classify(file)[0] != "unknown"
        ]
        if not any(_is_young(folder, file, grace_s) for file in of_reference):
            found += [
                Garbage(file, files[file], "no pair set was scored by its reference") for file in of_reference
            ]
    if scores:
        found += [
            entry
            for reference_id in sorted(needed)
            for entry in _unused_scores(folder, reference_id, manifests, files)
        ]
    for file, size in folder.hidden().items():
        if file.startswith(f"{QUARANTINE}/"):
            found.append(Garbage(file, size, "set aside by `dpo-cache verify --repair`"))
        elif file.endswith(".tmp") and _is_scratch(file):
            found.append(Garbage(file, size, "scratch of a writer that was killed"))
    return [entry for entry in found if not _is_young(folder, entry.file, grace_s)]


def collect_garbage(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> list[Garbage]:
    """Remove what `find_garbage` finds, twice over: what somebody has come to need meanwhile stays. Returns
    what went.
    """
    planned = find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s)
    again = set(find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s))
    going = sorted(
        (entry for entry in planned if entry in again), key=lambda entry: removal_order(entry.file)
    )
    used: dict[str, np.ndarray] = {}
    for entry in going:
        if entry.unused_rows is not None:
            reference_id = classify(entry.file)[1][0]
            if reference_id not in used:
                manifests = {name: read_manifest(cache.folder, f"pairs/{name}") for name in cache.pair_sets()}
                used[reference_id] = _used_keys(cache.folder, reference_id, manifests)
            _publish_used(cache.folder, entry.file, used[reference_id])
        cache.folder.remove(entry.file)
    return going


def removal_order(file: str) -> tuple[int, str]:
    """Sorts files so that whatever is cut off leaves a valid cache: manifests first, entries of references
    last.
    """
    return {"manifest": 0, "part": 1, "shard": 2, "unknown": 3, "reference": 4}[classify(file)[0]], file


def _is_scratch(file: str) -> bool:
    """Whether a dot-file lies where writers of this cache put theirs."""
    return file.rpartition("/")[0].split("/")[0] in ("", "references", "pairs")


def _reference_kept(cache: Cache, name: str) -> str:
    """The reference that `keep` names, by its id or by a pair set scored by it."""
    if any(entry == name or entry.startswith(f"{name}/") for entry in cache.pair_sets()):
        return cache.pairs(find_pair_sets(cache, name)[0]).reference_id
    return cache.find_reference(name)


def _is_young(folder: Folder, file: str, grace_s: float) -> bool:
    """Whether somebody may be about to need it. A store that tells no times has young files alone, unless no
    grace is asked for.
    """
    if grace_s <= 0:
        return False
    modified = folder.modified(file)
    return modified is None or time.time() - modified < grace_s


def _unused_scores(
    folder: Folder, reference_id: str, manifests: dict[str, Document], files: dict[str, int]
) -> list[Garbage]:
    place = f"references/{reference_id}/scores"
    shards = [file for file in files if file.startswith(f"{place}/") and classify(file)[0] == "shard"]
    used = _used_keys(folder, reference_id, manifests)
    found = []
    for file in shards:
        keys = keys_in(folder, place, file.rpartition("/")[2])
        num_unused = int((~np.isin(keys, used)).sum())
        if num_unused == len(keys):
            found.append(Garbage(file, files[file], f"no pair set holds its {num_unused} completions"))
        elif num_unused:
            size = files[file] * num_unused // len(keys)
            found.append(
                Garbage(
                    file,
                    size,
                    f"no pair set holds {num_unused} of its {len(keys)} completions (the rest is kept)",
                    num_unused,
                )
            )
    return found


def _used_keys(folder: Folder, reference_id: str, manifests: dict[str, Document]) -> np.ndarray:
    """Keys of all completions in pair sets scored by the reference, S16, sorted."""
    found = [np.empty(0, "S16")]
    for name, manifest in manifests.items():
        if manifest["reference"] != reference_id:
            continue
        for part in manifest["parts"]:
            file = f"pairs/{name}/{part['file']}"
            reader = ParquetReader(open_source(folder, file), PAIR_SCHEMA, f"{folder}/{file}")
            for group in range(len(reader.group_rows)):
                table = reader.read_group(group, ["chosen_key", "rejected_key"])
                found += [keys_of(table.column(column)) for column in table.column_names]
            reader.close()
    return np.unique(np.concatenate(found))


def _publish_used(folder: Folder, file: str, used: np.ndarray) -> None:
    """Publish the rows of a shard whose keys are used, as a shard of their own."""
    place, _, name = file.rpartition("/")
    tables = [
        table.filter(pa.array(np.isin(keys_of(table.column("key")), used)))
        for table in read_shard(folder, place, name)
    ]
    kept = pa.concat_tables(tables)
    content = write_parquet(kept.cast(SHARD_SCHEMA), row_group_size=max(len(table) for table in tables))
    folder.publish(f"{place}/{name_by_content(content)}", content)
