"""What a cache holds, from its JSON files and the footers of its Parquet files: fast, whatever its size.

Nothing is verified here beyond what has to be read. A file that cannot be read is noted where it stands, and
the rest is told all the same: see `verify.py` for the proof.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

import pyarrow as pa

from dpo_cache.errors import CacheError, NewerFormatError, NotInCacheError, first_line
from dpo_cache.store.cache import NAME_PATTERN, Cache, open_cache, read_reference
from dpo_cache.store.folders.folder import Folder, open_folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, read_manifest
from dpo_cache.store.format.parquet import open_parquet, open_source
from dpo_cache.store.format.shards import SHARD_SCHEMA

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
    model: str | None  # as it was named when it was scored; None where its entry cannot be read
    dtype: str | None
    quantization: str | None
    shards: int
    completions: int  # one that two writers scored counts twice until `compact`
    tokens: int
    bytes: int
    damage: list[str] = field(default_factory=list)
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
    manifest: Document | None = None


@dataclass(frozen=True)
class Contents:
    """All that a cache holds. `other` are files that belong to no reference and no pair set, `hidden` scratch
    and what was set aside.
    """

    cache: str
    references: list[ReferenceEntry]
    pair_sets: list[PairSetEntry]
    bytes: int
    damage: list[str]
    other: dict[str, int]


def classify(name: str) -> tuple[str, tuple[str, ...]]:
    """The kind of a file by its name from the root (`unknown` where it has none), and the parts that its name
    tells.
    """
    for kind, pattern in KINDS.items():
        if found := pattern.fullmatch(name):
            return kind, found.groups()
    return "unknown", ()


def open_for_upkeep(location: str | os.PathLike[str]) -> tuple[Folder, str | None]:
    """The folder of a cache, and what is wrong with its format.json: that alone need not stop who looks at
    the rest.

    Raises `FormatError` where there is no cache at all, or one made by a newer dpo-cache.
    """
    try:
        return open_cache(location).folder, None
    except NewerFormatError as error:
        raise NewerFormatError(
            f"{error}\n"
            "Where no newer dpo-cache ever wrote here, its format.json is damaged: delete it and run "
            "`dpo-cache verify --repair`."
        ) from error
    except CacheError as error:
        folder = open_folder(location)
        if not set(folder.names("")) & {"references", "pairs", "format.json"}:
            raise
        return folder, str(error)


def read_contents(location: str | os.PathLike[str]) -> Contents:
    """What the cache at a path or URL holds."""
    folder, problem = open_for_upkeep(location)
    files = folder.files()
    by_kind: dict[str, dict[str, list[str]]] = {kind: {} for kind in [*KINDS, "unknown"]}
    for name in files:
        kind, parts = classify(name)
        by_kind[kind].setdefault(parts[0] if parts else "", []).append(name)
    references = sorted(by_kind["reference"].keys() | by_kind["shard"].keys())
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
        damage=[problem] if problem else [],
        other={name: files[name] for name in sorted(other)},
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


def count_rows(folder: Folder, name: str) -> tuple[int, int]:
    """Completions and completion tokens of a score shard, from its footer. Raises `CacheError` where that is
    damaged.
    """
    return count_footer(open_source(folder, name), f"{folder}/{name}")


def count_footer(source: pa.NativeFile, place: str) -> tuple[int, int]:
    """The same of an open file, whose place is for the error."""
    footer, _ = open_parquet(source, SHARD_SCHEMA, place)
    values = SHARD_SCHEMA.get_field_index("token_logps")
    return sum(footer.group_rows), sum(chunks[values].num_values for chunks in footer.chunks)


def describe_quantization(identity: Document) -> str | None:
    """How the weights were quantized, in a word or two; None where they were not."""
    config = identity.get("quantization")
    if not isinstance(config, dict):
        return str(config) if config else None
    bits = next(
        (name for flag, name in (("load_in_4bit", "4-bit"), ("load_in_8bit", "8-bit")) if config.get(flag)),
        config.get("bits"),
    )
    return " ".join(str(word) for word in (config.get("quant_method"), bits) if word) or "yes"


def _read_reference(
    folder: Folder, reference_id: str, shards: list[str], files: dict[str, int]
) -> ReferenceEntry:
    damage, document, completions, tokens = [], {}, 0, 0
    try:
        document = read_reference(folder, reference_id)
    except CacheError as error:
        damage.append(first_line(error))
    for name in shards:
        try:
            num_rows, num_tokens = count_rows(folder, name)
        except CacheError as error:
            damage.append(first_line(error))
        else:
            completions, tokens = completions + num_rows, tokens + num_tokens
    identity, provenance = document.get("identity", {}), document.get("provenance", {})
    return ReferenceEntry(
        id=reference_id,
        model=_text(provenance.get("model"))
        or _text(provenance.get("described"))
        or _text(identity.get("imported")),
        dtype=_text(identity.get("dtype")),
        quantization=describe_quantization(identity),
        shards=len(shards),
        completions=completions,
        tokens=tokens,
        bytes=sum(files[name] for name in shards) + files.get(f"references/{reference_id}/reference.json", 0),
        damage=damage,
        document=document or None,
    )


def _read_pair_set(folder: Folder, name: str, parts: list[str], files: dict[str, int]) -> PairSetEntry:
    place, damage, manifest = f"pairs/{name}", [], {}
    try:
        manifest = read_manifest(folder, place)
        named = {f"{place}/{part['file']}": part["rows"] for part in manifest["parts"]}
        damage = [
            problem
            for part, num_rows in named.items()
            if (problem := _part_problem(folder, part, num_rows, files))
        ]
    except CacheError as error:
        damage, named = [first_line(error)], {}
    held = set(parts) & named.keys() if manifest else set(parts)
    source = manifest.get("source", {})
    return PairSetEntry(
        name=name,
        reference=manifest.get("reference"),
        rows=manifest.get("num_pairs", 0),
        parts=len(named),
        bytes=sum(files[part] for part in held) + files[f"{place}/manifest.json"],
        source=_text(source.get("dataset")),
        created=_text(source.get("created")),
        damage=damage,
        manifest=manifest or None,
    )


def _text(value: object) -> str | None:
    """What a sealed document may say there, whoever sealed it; None for all else."""
    return value if isinstance(value, str) else None


def _part_problem(folder: Folder, name: str, num_rows: int, files: dict[str, int]) -> str | None:
    if name not in files:
        return f"{folder}/{name}: missing, though the manifest names it"
    try:
        footer, _ = open_parquet(open_source(folder, name), PAIR_SCHEMA, f"{folder}/{name}")
    except CacheError as error:
        return first_line(error)
    found = sum(footer.group_rows)
    return (
        None
        if found == num_rows
        else f"{folder}/{name}: the manifest promises {num_rows} pairs, found {found}"
    )
