"""Completions of which several caches hold values further apart than rounding explains.

The caches come in an order of preference. A completion's preferred value is that of the first cache that has
one. Memory: a range of keys (`key_ranges.py`), and the preferred values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from dpo_cache.store.cache import Cache
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.store.format.pair_tables import part_files
from dpo_cache.store.upkeep.compare import Values, largest_gaps, values_of
from dpo_cache.store.upkeep.contents import classify
from dpo_cache.store.upkeep.key_ranges import find_overlap, key_starts, rows_by_key
from dpo_cache.store.upkeep.row_files import Source
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
        """Return whether a file, in any cache, holds a value that is not the preferred one."""
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
    sources = [(number, file) for number, of_cache in enumerate(own) for file in of_cache]
    files: list[Source] = [(holders[number].cache.folder, file) for number, file in sources]
    overlap = find_overlap(files, [number for number, _ in sources]).files
    sources, files = [sources[place] for place in overlap], [files[place] for place in overlap]
    for table in rows_by_key(files):
        _compare_rows(found, values_of(table), sources)
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
        "`dpo-cache verify CACHE --rescore N --model MODEL` shows which are right."
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


def _compare_rows(found: Disagreement, values: Values, sources: list[tuple[int, str]]) -> None:
    """Add the completions of which a file of another cache has another value than the first cache that has
    one. `sources` are the files, each with the number of its cache.
    """
    has_values = np.flatnonzero(values.lengths > 0)  # imported sums have none
    _, first = key_starts(values.keys[has_values])
    first = has_values[first]
    cache_of = np.array([number for number, _ in sources])[values.source]
    is_elsewhere = cache_of[first] != cache_of[has_values]
    first, here = first[is_elsewhere], has_values[is_elsewhere]
    gaps = largest_gaps(values, first, here)
    is_apart = ~(gaps <= found.allowed)
    found.largest_gap = max(found.largest_gap, float(gaps[is_apart].max(initial=0.0)))
    starts, keys = values.starts, key_bytes(values.keys[first[is_apart]])
    for key, one, other in zip(keys, first[is_apart].tolist(), here[is_apart].tolist(), strict=True):
        number, file = sources[values.source[one]]
        other_number, other_file = sources[values.source[other]]
        found.files.add(PurePosixPath(other_file).name)
        found.between.setdefault((number, other_number), set()).add(key)
        token_logps = values.flat[starts[one] : starts[one] + values.lengths[one]]
        found.preferred.setdefault(
            key, Preferred(Score(token_logps.astype(np.float32)), classify(file)[0] == "shard")
        )
