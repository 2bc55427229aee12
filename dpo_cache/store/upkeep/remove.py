"""Remove a reference or a pair set, with the files that belong to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_cache.errors import CacheError
from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.upkeep.contents import classify, find_pair_sets, read_manifests, shard_files
from dpo_cache.store.upkeep.removal import put_back_needed, remove_unneeded


@dataclass(frozen=True)
class Removal:
    """The entries and files to remove."""

    references: list[str]
    pair_sets: list[str]
    files: dict[str, int]


def plan_removal(cache: Cache, kind: str, name: str, *, with_pairs: bool = False) -> Removal:
    """The files of a reference (by the first characters of its id) or of pair sets (`NAME`: all its splits,
    or `NAME/SPLIT`).

    Raises `NotInCacheError` where there is none, `CacheError` for a reference that pair sets still name,
    unless `with_pairs`.
    """
    if kind == "pairs":
        references, pair_sets = [], find_pair_sets(cache, name)
    else:
        references = [cache.find_reference(name)]
        manifests = read_manifests(cache)
        pair_sets = [entry for entry in manifests if manifests[entry]["reference"] == references[0]]
        if pair_sets and not with_pairs:
            raise CacheError(
                f"{cache}: reference {references[0][:12]} has pair sets: {', '.join(pair_sets)}.\n"
                "Remove them first, or add `with_pairs` to remove them with it."
            )
    folders = [f"references/{entry}" for entry in references] + [f"pairs/{entry}" for entry in pair_sets]
    files = {file: size for folder in folders for file, size in cache.folder.files(folder).items()}
    return Removal(references, pair_sets, files)


def remove(cache: Cache, kind: str, name: str, *, with_pairs: bool = False) -> Removal:
    """Remove what `plan_removal` finds. What a killed removal hid and a pair set needs gets its name back
    first.
    """
    put_back_needed(cache.folder, cache.folder.hidden())
    removal = plan_removal(cache, kind, name, with_pairs=with_pairs)
    remove_files(cache, list(removal.files))
    return removal


def remove_files(cache: Cache, files: Sequence[str]) -> None:
    """Remove the files, in an order that leaves a valid cache where it is interrupted.

    What a pair set needs that was published meanwhile stays, and so do files of other users that this one may
    not remove, both with a remark.
    """
    remove_unneeded(cache.folder, files).log(cache.folder)
    for kind, parts in map(classify, files):
        if kind == "reference":
            remove_later_scores(cache.folder, parts[0])


def remove_later_scores(folder: Folder, reference_id: str) -> None:
    """Remove scores that were published under the reference while it was removed, if its entry is gone."""
    shards = shard_files(folder, reference_id)  # listed first: an entry is published before its scores
    if not folder.exists(f"references/{reference_id}/reference.json"):
        remove_unneeded(folder, shards, always=shards).log(folder)
