"""Completions of which several caches hold values further apart than rounding explains.

The caches come in an order of preference. A completion's preferred value is that of the first cache that has
one. Memory: 16 bytes for each completion of the caches, a range of values, and the preferred values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np

from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.store.format.pair_tables import part_files
from dpo_cache.store.upkeep.compare import (
    Values,
    join,
    key_ranges,
    largest_gaps,
    matches,
    read_file_keys,
    read_values,
)
from dpo_cache.store.upkeep.contents import classify
from dpo_cache.types import Score


@dataclass(frozen=True)
class Holder:
    """A cache, and its files with values of one reference: shards, then parts; names from the root, sizes."""

    cache: Cache
    files: dict[str, int]


@dataclass(frozen=True)
class Preferred:
    """The value to keep of a completion, and whether a score shard holds it."""

    score: Score
    in_shard: bool


@dataclass
class Disagreement:
    """The completions of one reference on which caches disagree."""

    allowed: float  # nats a token
    largest_gap: float = 0.0
    # the preferred cache and the other one, as positions in the order of preference -> keys
    between: dict[tuple[int, int], set[bytes]] = field(default_factory=dict)
    preferred: dict[bytes, Preferred] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)  # own names of files with another value

    def __len__(self) -> int:
        """Distinct completions."""
        return len(self.preferred)

    def is_in(self, file: str) -> bool:
        """Whether a file, in any cache, holds a value that is not the preferred one."""
        return PurePosixPath(file).name in self.files


def files_with_values(cache: Cache, manifests: dict[str, Document]) -> dict[str, dict[str, int]]:
    """The files of each reference that hold token log-probs, shards first, with their sizes in bytes."""
    found: dict[str, dict[str, int]] = {}
    for file, num_bytes in cache.folder.files("references").items():
        kind, names = classify(file)
        if kind == "shard":
            found.setdefault(names[0], {})[file] = num_bytes
    listed = cache.folder.files("pairs")
    for manifest in manifests.values():
        parts = part_files(manifest) if manifest.get("token_logps", True) else {}
        found.setdefault(manifest["reference"], {}).update(
            {file: part["bytes"] for file, part in parts.items() if file in listed}
        )
    return found


def find_disagreement(holders: Sequence[Holder], allowed: float) -> Disagreement:
    """Compare what the caches hold of one reference; values differ by more than `allowed` nats in a token.

    Files of equal content are read once, and nothing is read if only one cache has files of its own.
    """
    found, own = Disagreement(allowed), _distinct_files(holders)
    if sum(map(bool, own)) < 2:
        return found
    keys = [
        {file: read_file_keys(holder.cache.folder, file) for file in files}
        for holder, files in zip(holders, own, strict=True)
    ]
    shared = _shared_keys(keys)
    overlapping = [
        {file: files[file] for file in files if np.isin(of_cache[file], shared).any()}
        for files, of_cache in zip(own, keys, strict=True)
    ]
    del keys
    for span in key_ranges(sum(sum(files.values()) for files in overlapping)) if len(shared) else []:
        _compare_range(found, holders, overlapping, shared, span)
    return found


def describe_disagreement(reference: str, found: Disagreement, holders: list[Holder]) -> str:
    """One line: the reference, how much differs, and between which caches."""
    caches = sorted({number for pair in found.between for number in pair})
    return (
        f"  reference {reference[:12]}: {len(found):,} completions differ by up to {found.largest_gap:.2g} "
        f"nats a token (allowed {found.allowed:g}) between "
        + " and ".join(str(holders[number].cache) for number in caches)
    )


def describe_undecided(lines: list[str], prefer: str | None) -> str:
    """The error's message for references on which caches disagree, a line each, where nothing decides."""
    advice = (
        "The destination has no values to prefer for some of them: take the last source's with `prefer` src."
        if prefer
        else "Keep the destination's values with `prefer` dest, or the last source's with `prefer` src; "
        "`dpo-cache verify CACHE --rescore N --model MODEL` shows whose are right."
    )
    return (
        "caches hold other values of the same completions; nothing was copied:\n"
        + "".join(f"{line}\n" for line in lines)
        + advice
    )


def _distinct_files(holders: Sequence[Holder]) -> list[dict[str, int]]:
    """The files of each cache that no cache before it has under any name, shards first."""
    seen: set[str] = set()
    own: list[dict[str, int]] = []
    for holder in holders:
        names = {file: PurePosixPath(file).name for file in holder.files}
        own.append({file: holder.files[file] for file in names if names[file] not in seen})
        seen |= set(names.values())
    return own


def _shared_keys(keys: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Keys that files of several caches hold, ascending."""
    each = [np.unique(np.concatenate([*files.values(), np.empty(0, "S16")])) for files in keys]
    distinct, counts = np.unique(np.concatenate(each), return_counts=True)
    return distinct[counts > 1]


def _compare_range(
    found: Disagreement,
    holders: Sequence[Holder],
    files: Sequence[dict[str, int]],
    shared: np.ndarray,
    span: range,
) -> None:
    """Compare the values of completions whose keys are shared and in the range."""
    known = join([])
    owner, in_shard = np.empty(0, np.int64), np.empty(0, bool)
    for number, (holder, of_cache) in enumerate(zip(holders, files, strict=True)):
        values = {file: _read_shared(holder.cache.folder, file, shared, span) for file in of_cache}
        for file, one in values.items():
            _note_gaps(found, known, owner, in_shard, one, number, file)
        lengths = [len(one) for one in values.values()]
        are_shards = [classify(file)[0] == "shard" for file in values]
        together = join([known, *values.values()])
        owner = np.concatenate([owner, np.full(sum(lengths), number)])
        in_shard = np.concatenate([in_shard, np.repeat(np.array(are_shards, bool), lengths)])
        _, first = np.unique(together.keys, return_index=True)
        known, owner, in_shard = together.take(first), owner[first], in_shard[first]


def _read_shared(folder: Folder, file: str, shared: np.ndarray, span: range) -> Values:
    """The file's values of shared completions in the range; imported sums have none."""
    values = read_values(folder, [file], span)
    return values.take(np.flatnonzero(np.isin(values.keys, shared) & (values.lengths > 0)))


def _note_gaps(
    found: Disagreement,
    known: Values,
    owner: np.ndarray,
    in_shard: np.ndarray,
    values: Values,
    number: int,
    file: str,
) -> None:
    """Add the completions of which a file of cache `number` has another value than is known by then."""
    here, there = matches(known, values.keys)
    gaps = largest_gaps(known.take(there), values.take(here))
    apart = np.flatnonzero(~(gaps <= found.allowed))
    if not len(apart):
        return
    found.files.add(PurePosixPath(file).name)
    found.largest_gap = max(found.largest_gap, float(gaps[apart].max()))
    kept = known.take(there[apart])
    bounds = [*kept.starts.tolist(), len(kept.flat)]
    for key, place, (start, end) in zip(key_bytes(kept.keys), there[apart], pairwise(bounds), strict=True):
        found.between.setdefault((int(owner[place]), number), set()).add(key)
        score = Score(kept.flat[start:end].astype(np.float32))
        found.preferred.setdefault(key, Preferred(score, bool(in_shard[place])))
