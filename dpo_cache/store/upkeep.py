"""Fewer and smaller files: compact, gc and rm. Writers and readers may be at work all the while.

Nothing is removed before what replaces it is durable, and nothing that is younger than a grace period is taken for
garbage: a writer publishes parts before the manifest that names them, and scores before the pair set that needs them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CacheError, CorruptShardError
from dpo_cache.store.cache import Cache
from dpo_cache.store.comparing import allowed_gap, compare_files
from dpo_cache.store.contents import classify, count_rows, find_pair_sets
from dpo_cache.store.documents import Document
from dpo_cache.store.files import Folder
from dpo_cache.store.keys import is_sorted
from dpo_cache.store.merging import SHARD_BYTES, merge_shards, write_sorted_shards
from dpo_cache.store.pairs import PAIR_SCHEMA, read_manifest
from dpo_cache.store.parquet import ParquetReader, name_by_content, open_source, write_parquet
from dpo_cache.store.repair import QUARANTINE
from dpo_cache.store.shards import ROW_BYTES, SHARD_SCHEMA, keys_of, open_shard, read_keys, read_shard

GRACE_S = 3600.0


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
    """Merge the reference's score shards into few large ones, sorted by key; a cache that is compact already is left alone.

    The new shards are durable before the old ones are removed; a crash leaves both, which is legal, and the next run ends
    the work. Shards that others publish meanwhile are left as they are. Memory: 16 bytes a completion, and a shard.
    Raises `CorruptShardError` where a shard is damaged, or where shards disagree on a completion.
    """
    folder, place = cache.folder, f"references/{reference_id}/scores"
    sizes = {name.rpartition("/")[2]: size for name, size in folder.files(place).items() if classify(name)[0] == "shard"}
    names = sorted(sizes)
    keys = {name: _keys_in(folder, place, name) for name in names}
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
        raise CorruptShardError(f"{folder}/{place}: {distinct} completions to merge, {written} written. Nothing was removed: run `dpo-cache verify`.")
    for name in names:
        if name not in merged:
            folder.remove(f"{place}/{name}")
    after = sum(folder.size(f"{place}/{name}") for name in merged)
    return Compacted(reference_id, before[0], len(merged), before[1], after, distinct, num_rows - distinct)


def _keys_in(folder: Folder, place: str, name: str) -> np.ndarray:
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


@dataclass(frozen=True)
class Garbage:
    """A file that nothing needs, and why. With `unused_rows` only these rows go, and the rest is written anew first."""

    file: str
    bytes: int
    why: str
    unused_rows: int | None = None


def find_garbage(cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S) -> list[Garbage]:
    """What could go: parts that no manifest names, references that no pair set was scored by and that are not in `keep`
    (ids, their first characters, or pair sets), scratch of killed writers, what `verify --repair` set aside; with `scores`
    also the scores of completions that no pair set holds.

    Nothing that was written less than `grace_s` seconds ago. Raises `CorruptShardError` where a manifest is damaged, for
    what it names is not known.
    """
    folder, files = cache.folder, cache.folder.files()
    manifests = {name: read_manifest(folder, f"pairs/{name}") for name in cache.pair_sets()}
    named = {f"pairs/{name}/{part['file']}" for name, manifest in manifests.items() for part in manifest["parts"]}
    needed = {manifest["reference"] for manifest in manifests.values()} | {_reference_kept(cache, name) for name in keep}
    found = [Garbage(file, files[file], "no manifest names it") for file in files if classify(file)[0] == "part" and file not in named]
    for reference_id in sorted({classify(file)[1][0] for file in files if classify(file)[0] in ("reference", "shard")} - needed):
        of_reference = [file for file in files if file.startswith(f"references/{reference_id}/") and classify(file)[0] != "unknown"]
        if not any(_is_young(folder, file, grace_s) for file in of_reference):
            found += [Garbage(file, files[file], "no pair set was scored by its reference") for file in of_reference]
    if scores:
        found += [entry for reference_id in sorted(needed) for entry in _unused_scores(folder, reference_id, manifests, files)]
    for file, size in folder.hidden().items():
        if file.startswith(f"{QUARANTINE}/"):
            found.append(Garbage(file, size, "set aside by verify --repair"))
        elif file.endswith(".tmp") and _is_scratch(file):
            found.append(Garbage(file, size, "scratch of a writer that was killed"))
    return [entry for entry in found if not _is_young(folder, entry.file, grace_s)]


def collect_garbage(cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S) -> list[Garbage]:
    """Remove what `find_garbage` finds, twice over: what somebody has come to need meanwhile stays. Returns what went."""
    planned = find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s)
    again = set(find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s))
    going = sorted((entry for entry in planned if entry in again), key=lambda entry: removal_order(entry.file))
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
    """Sorts files so that whatever is cut off leaves a valid cache: manifests first, entries of references last."""
    return {"manifest": 0, "part": 1, "shard": 2, "unknown": 3, "reference": 4}[classify(file)[0]], file


def _is_scratch(file: str) -> bool:
    """Whether a dot-file lies where writers of this cache put theirs."""
    return file.rpartition("/")[0].split("/")[0] in ("", "references", "pairs")


def _reference_kept(cache: Cache, name: str) -> str:
    """The reference that `--keep` names, by its id or by a pair set scored by it."""
    if any(entry == name or entry.startswith(f"{name}/") for entry in cache.pair_sets()):
        return cache.pairs(find_pair_sets(cache, name)[0]).reference_id
    return cache.find_reference(name)


def _is_young(folder: Folder, file: str, grace_s: float) -> bool:
    """Whether somebody may be about to need it. A store that tells no times has young files alone, unless no grace is asked for."""
    if grace_s <= 0:
        return False
    modified = folder.modified(file)
    return modified is None or time.time() - modified < grace_s


def _unused_scores(folder: Folder, reference_id: str, manifests: dict[str, Document], files: dict[str, int]) -> list[Garbage]:
    place = f"references/{reference_id}/scores"
    shards = [file for file in files if file.startswith(f"{place}/") and classify(file)[0] == "shard"]
    used = _used_keys(folder, reference_id, manifests)
    found = []
    for file in shards:
        keys = _keys_in(folder, place, file.rpartition("/")[2])
        num_unused = int((~np.isin(keys, used)).sum())
        if num_unused == len(keys):
            found.append(Garbage(file, files[file], f"no pair set holds its {num_unused} completions"))
        elif num_unused:
            size = files[file] * num_unused // len(keys)
            found.append(Garbage(file, size, f"no pair set holds {num_unused} of its {len(keys)} completions (the rest is kept)", num_unused))
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
    tables = [table.filter(pa.array(np.isin(keys_of(table.column("key")), used))) for table in read_shard(folder, place, name)]
    kept = pa.concat_tables(tables)
    content = write_parquet(kept.cast(SHARD_SCHEMA), row_group_size=max(len(table) for table in tables))
    folder.publish(f"{place}/{name_by_content(content)}", content)


# -- rm ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """What goes with a reference or a pair set."""

    references: list[str]
    pair_sets: list[str]
    files: dict[str, int]


def plan_removal(cache: Cache, kind: str, name: str, *, with_pairs: bool = False) -> Removal:
    """The files of a reference (by the first characters of its id) or of pair sets (`NAME`: all its splits, or `NAME/SPLIT`).

    Raises `NotInCacheError` where there is none, `CacheError` for a reference that pair sets still name, unless `with_pairs`.
    """
    if kind == "pairs":
        references, pair_sets = [], find_pair_sets(cache, name)
    else:
        references = [cache.find_reference(name)]
        pair_sets = [entry for entry in cache.pair_sets() if read_manifest(cache.folder, f"pairs/{entry}")["reference"] == references[0]]
        if pair_sets and not with_pairs:
            raise CacheError(
                f"{cache}: reference {references[0][:12]} has pair sets: {', '.join(pair_sets)}.\n"
                "Remove them first, or add --with-pairs to remove them with it."
            )
    folders = [f"references/{entry}" for entry in references] + [f"pairs/{entry}" for entry in pair_sets]
    files = {file: size for folder in folders for file, size in cache.folder.files(folder).items()}
    return Removal(references, pair_sets, files)


def remove_files(cache: Cache, files: Sequence[str]) -> None:
    """Remove them, in an order that leaves a valid cache wherever it is cut off."""
    for file in sorted(files, key=removal_order):
        cache.folder.remove(file)
