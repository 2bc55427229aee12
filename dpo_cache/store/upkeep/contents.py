"""The contents of a cache, from its JSON files and the footers of its Parquet files: fast, whatever its size.

Only the bytes that are read are checked, unlike in `verify.py`. Damage, and what the disk or the store does
not let us read, is listed with its reference or pair set, and the rest is reported all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dpo_cache.errors import (
    CacheError,
    CorruptShardError,
    MissingFileError,
    NewerFormatError,
    NotInCacheError,
    StorageError,
    first_line,
)
from dpo_cache.store.cache import NAME_PATTERN, Cache, open_cache, read_reference
from dpo_cache.store.folders.folder import Folder, open_folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, part_files, read_manifest
from dpo_cache.store.format.parquet import open_unverified
from dpo_cache.store.format.shards import SHARD_SCHEMA

Result = TypeVar("Result")

PLANS = 3  # attempts of one task, if another process compacts or collects the files that it needs

_DIGEST = r"[0-9a-f]{64}"
_NAME = NAME_PATTERN.pattern
KINDS = {
    "format": re.compile(r"format\.json"),
    "reference": re.compile(rf"references/({_DIGEST})/reference\.json"),
    "shard": re.compile(rf"references/({_DIGEST})/scores/({_DIGEST}\.parquet)"),
    "manifest": re.compile(rf"pairs/({_NAME}/{_NAME})/manifest\.json"),
    "part": re.compile(rf"pairs/({_NAME}/{_NAME})/({_DIGEST}\.parquet)"),
}


@dataclass(frozen=True)
class ReferenceEntry:
    """One reference and its scores."""

    id: str
    model: str | None  # its name when it was scored; None where its entry cannot be read
    dtype: str | None
    quantization: str | None
    shards: int
    completions: int  # one that two writers scored counts twice until `compact`
    tokens: int
    bytes: int
    damage: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # whatever its bytes are
    document: Document | None = None


@dataclass(frozen=True)
class PairSetEntry:
    """One pair set."""

    name: str
    reference: str | None
    rows: int
    parts: int
    bytes: int
    source: str | None
    created: str | None
    damage: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # whatever its bytes are
    manifest: Document | None = None


@dataclass(frozen=True)
class Contents:
    """All that a cache holds. `other` are files that belong to no reference and no pair set."""

    cache: str
    references: list[ReferenceEntry]
    pair_sets: list[PairSetEntry]
    bytes: int
    damage: list[str]
    other: dict[str, int]
    unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Noted:
    """First lines of errors, by whether the file system refused to read."""

    damage: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def add(self, error: CacheError) -> None:
        """Note an error. A file that is not there any more counts as one that cannot be read."""
        (self.unreadable if isinstance(error, StorageError) else self.damage).append(first_line(error))


def classify(name: str) -> tuple[str, tuple[str, ...]]:
    """The kind of a file by its name from the root, `unknown` where none fits; and the id or `NAME/SPLIT` and
    the file's own name, as far as its kind has them.
    """
    for kind, pattern in KINDS.items():
        if found := pattern.fullmatch(name):
            return kind, found.groups()
    return "unknown", ()


def open_for_upkeep(location: str | os.PathLike[str]) -> tuple[Folder, str | None]:
    """The folder of a cache, and the problem of a damaged format.json: the rest can still be read.

    Raises `FormatError` where there is no cache at all, or one made by a newer dpo-cache.
    """
    try:
        return open_cache(location).folder, None
    except NewerFormatError as error:
        raise NewerFormatError(
            f"{error}\n"
            "If no newer dpo-cache ever wrote here, its format.json is damaged: delete it and run "
            "`dpo-cache verify --repair`."
        ) from error
    except CacheError as error:
        folder = open_folder(location)
        if not set(folder.names("")) & {"references", "pairs", "format.json"}:
            raise
        return folder, str(error)


def read_contents(location: str | os.PathLike[str]) -> Contents:
    """The contents of the cache at a path or URL."""
    folder, problem = open_for_upkeep(location)
    files = folder.files()
    by_kind: dict[str, dict[str, list[str]]] = {kind: {} for kind in [*KINDS, "unknown"]}
    for name in files:
        kind, parts = classify(name)
        by_kind[kind].setdefault(parts[0] if parts else "", []).append(name)
    references = sorted(by_kind["reference"].keys() | by_kind["shard"].keys())
    is_refused = problem is not None and isinstance(_error_of(folder.read, "format.json"), StorageError)
    strays = [names for place, names in by_kind["part"].items() if place not in by_kind["manifest"]]
    other = [name for names in [*by_kind["unknown"].values(), *strays] for name in names]
    return Contents(
        cache=str(folder),
        references=[
            _read_reference(folder, entry, by_kind["shard"].get(entry, []), files) for entry in references
        ],
        pair_sets=[
            _read_pair_set(folder, entry, by_kind["part"].get(entry, []), files)
            for entry in sorted(by_kind["manifest"])
        ],
        bytes=sum(files.values()),
        damage=[problem] if problem and not is_refused else [],
        other={name: files[name] for name in sorted(other)},
        unreadable=[problem] if problem and is_refused else [],
    )


def find_pair_sets(cache: Cache, name: str) -> list[str]:
    """`NAME/SPLIT` of every pair set of that name, or the one that is named in full. Raises
    `NotInCacheError`.
    """
    known = cache.pair_sets()
    found = [entry for entry in known if entry == name or entry.startswith(f"{name}/")]
    if not found:
        raise NotInCacheError(
            f"{cache}: no pair set {name!r}.\nIt holds: {', '.join(known) or 'no pair sets'}."
        )
    return found


def read_manifests(cache: Cache) -> dict[str, Document]:
    """The manifest of every pair set by `NAME/SPLIT`. Raises `CorruptShardError` where one is damaged."""
    return {name: read_manifest(cache.folder, f"pairs/{name}") for name in cache.pair_sets()}


def shard_files(folder: Folder, reference_id: str) -> dict[str, int]:
    """The reference's score shards by their names from the root, with their sizes in bytes."""
    files = folder.files(f"references/{reference_id}/scores")
    return {name: size for name, size in files.items() if classify(name)[0] == "shard"}


def count_rows(folder: Folder, shard: str) -> tuple[int, int]:
    """Completions and completion tokens of a score shard, from its footer. Raises `CacheError` where it is
    damaged.
    """
    values = SHARD_SCHEMA.get_field_index("token_logps")
    with open_unverified(folder, shard, SHARD_SCHEMA, is_brief=True) as reader:
        footer = reader.footer
        return footer.num_rows, sum(chunks[values].num_values for chunks in footer.chunks)


def describe_quantization(identity: Document) -> str | None:
    """How the weights were quantized, in a word or two; None where they were not."""
    config = identity.get("quantization")
    if not isinstance(config, dict):
        return str(config) if config else None
    flags = {"load_in_4bit": "4-bit", "load_in_8bit": "8-bit"}
    bits = next((name for flag, name in flags.items() if config.get(flag)), config.get("bits"))
    return " ".join(str(word) for word in (config.get("quant_method"), bits) if word) or "yes"


def _read_reference(
    folder: Folder, reference_id: str, shards: list[str], files: dict[str, int]
) -> ReferenceEntry:
    noted = _Noted()
    document = _noting(noted, read_reference, folder, reference_id) or {}
    counts = _noting_each(folder, noted, count_rows, [(folder, name) for name in shards])
    identity, provenance = document.get("identity", {}), document.get("provenance", {})
    return ReferenceEntry(
        id=reference_id,
        model=_text(provenance.get("model"))
        or _text(provenance.get("described"))
        or _text(identity.get("imported")),
        dtype=_text(identity.get("dtype")),
        quantization=describe_quantization(identity),
        shards=len(shards),
        completions=sum(num_rows for num_rows, _ in counts),
        tokens=sum(num_tokens for _, num_tokens in counts),
        bytes=sum(files[name] for name in shards) + files.get(f"references/{reference_id}/reference.json", 0),
        damage=noted.damage,
        unreadable=noted.unreadable,
        document=document or None,
    )


def _read_pair_set(folder: Folder, name: str, parts: list[str], files: dict[str, int]) -> PairSetEntry:
    noted = _Noted()
    manifest = _noting(noted, read_manifest, folder, f"pairs/{name}") or {}
    named = part_files(manifest) if manifest else {}
    calls = [(folder, file, part["rows"], files) for file, part in named.items()]
    _noting_each(folder, noted, _check_part, calls)
    held = set(parts) & named.keys() if manifest else set(parts)
    source = manifest.get("source", {})
    return PairSetEntry(
        name=name,
        reference=manifest.get("reference"),
        rows=manifest.get("num_pairs", 0),
        parts=len(named),
        bytes=sum(files[part] for part in held) + files[f"pairs/{name}/manifest.json"],
        source=_text(source.get("dataset")),
        created=_text(source.get("created")),
        damage=noted.damage,
        unreadable=noted.unreadable,
        manifest=manifest or None,
    )


def _text(value: object) -> str | None:
    """A document's text; None for a value of another type, which whoever sealed it may have written."""
    return value if isinstance(value, str) else None


def _check_part(folder: Folder, file: str, num_rows: int, files: dict[str, int]) -> None:
    if file not in files:
        raise CorruptShardError(f"{folder}/{file}: missing, though the manifest names it")
    with open_unverified(folder, file, PAIR_SCHEMA, is_brief=True) as reader:
        found = reader.footer.num_rows
    if found != num_rows:
        raise CorruptShardError(f"{folder}/{file}: the manifest promises {num_rows} pairs, found {found}")


def _error_of(read: Callable[..., Any], *arguments: Any) -> CacheError | None:
    """The `CacheError` that a call raises; None if it raises none."""
    try:
        read(*arguments)
    except CacheError as error:
        return error
    return None


def _noting(noted: _Noted, read: Callable[..., Result], *arguments: Any) -> Result | None:
    """The result of a call; where it raises `CacheError`, None, and the error is noted."""
    try:
        return read(*arguments)
    except CacheError as error:
        noted.add(error)
        return None


def _noting_each(
    folder: Folder, noted: _Noted, read: Callable[..., Result], calls: Sequence[tuple[Any, ...]]
) -> list[Result]:
    """The results of calls with these arguments, several at once in an object store; those that raise
    `CacheError` are left out, and the errors are noted.
    """

    def attempt(arguments: tuple[Any, ...]) -> Result | CacheError:
        try:
            return read(*arguments)
        except CacheError as error:
            return error

    results = []
    for result in folder.each(attempt, calls):
        if isinstance(result, CacheError):
            noted.add(result)
        elif result is not None:
            results.append(result)
    return results


def with_new_plans(act: Callable[[], Result]) -> Result:
    """Return the result of `act`, which lists files and reads them. If others compacted or collected a file
    since it was listed, it is called again, up to `PLANS` times in all.
    """
    for _ in range(PLANS - 1):
        with suppress(MissingFileError):
            return act()
    return act()
