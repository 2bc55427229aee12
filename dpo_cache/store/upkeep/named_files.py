"""The files that the manifests of a cache name: parts, and the entries and scores of their references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from dpo_cache.errors import MissingFileError, StorageError, first_line
from dpo_cache.store.cache import NAME_PATTERN
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import part_files, read_manifest
from dpo_cache.store.upkeep.contents import classify


@dataclass
class NamedFiles:
    """The manifests, by `NAME/SPLIT`, and those that this user cannot read. The other members are computed
    from them once, when they are first used.
    """

    manifests: dict[str, Document] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)  # folder of pair sets or manifest -> why

    @cached_property
    def references(self) -> set[str]:
        """Ids of the references by which the pair sets were scored, as far as manifests can be read."""
        return {manifest["reference"] for manifest in self.manifests.values()}

    @cached_property
    def parts(self) -> set[str]:
        """The parts of all pair sets, by their names from the root."""
        return {file for manifest in self.manifests.values() for file in part_files(manifest)}

    def may_need(self, file: str) -> bool:
        """Return whether a manifest names the file, which is a part, a shard or an entry of a reference, or
        its reference; a manifest that cannot be read may do so.
        """
        kind, (owner, *_) = classify(file)
        if kind == "part":
            folders = ("pairs", f"pairs/{owner.partition('/')[0]}", f"pairs/{owner}")
            return file in self.parts or not self.unreadable.keys().isdisjoint(folders)
        return bool(self.unreadable) or owner in self.references


def read_named_files(folder: Folder) -> NamedFiles:
    """The files that the manifests of the cache name now. Raises `CorruptShardError` where a manifest is
    damaged.
    """
    found = NamedFiles()
    for pair_set in _folders(folder, found):
        _read_manifest(folder, pair_set, found)
    return found


def read_named_parts(folder: Folder, pair_set: str) -> NamedFiles:
    """The same of one pair set, `NAME/SPLIT`."""
    found = NamedFiles()
    _read_manifest(folder, pair_set, found)
    return found


def _folders(folder: Folder, found: NamedFiles) -> Iterator[str]:
    """`NAME/SPLIT` of each folder that may hold a pair set."""
    for name in _names(folder, "pairs", found):
        for split in _names(folder, f"pairs/{name}", found):
            yield f"{name}/{split}"


def _names(folder: Folder, place: str, found: NamedFiles) -> Iterator[str]:
    try:
        yield from filter(NAME_PATTERN.fullmatch, folder.names(place))
    except StorageError as error:
        if not isinstance(error.__cause__, NotADirectoryError):  # a stray file is no folder of pair sets
            found.unreadable[place] = first_line(error)


def _read_manifest(folder: Folder, pair_set: str, found: NamedFiles) -> None:
    place = f"pairs/{pair_set}"
    try:
        if folder.exists(f"{place}/manifest.json"):
            found.manifests[pair_set] = read_manifest(folder, place)
    except MissingFileError:  # removed meanwhile
        return
    except StorageError as error:
        found.unreadable[place] = first_line(error)
