"""Two caches side by side: what one has and the other lacks, and what both have but differently."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dpo_cache.store.cache import Cache, open_cache
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.upkeep.compare import (
    KeyRange,
    Values,
    allowed_gap,
    distinct,
    join,
    key_ranges,
    largest_gaps,
    matches,
    part_values,
    shard_values,
)
from dpo_cache.store.upkeep.contents import classify, count_rows

# of a manifest; its source and date say where it is from, not what it is
TOLD = ("num_pairs", "reference", "pairs_digest", "tokenization")


@dataclass(frozen=True)
class ScoreDifference:
    """How the scores of one reference differ; counts of distinct completions."""

    only_a: int
    only_b: int
    both: int
    differing: int  # by more than the tolerance of the dtype
    largest_gap: float  # in nats a token; infinite where the number of tokens differs

    @property
    def is_none(self) -> bool:
        return not (self.only_a or self.only_b or self.differing)


@dataclass
class DiffReport:
    """What differs. Empty lists and dicts where nothing does."""

    a: str
    b: str
    references_only_a: list[str] = field(default_factory=list)
    references_only_b: list[str] = field(default_factory=list)
    scores: dict[str, ScoreDifference] = field(default_factory=dict)
    pair_sets_only_a: list[str] = field(default_factory=list)
    pair_sets_only_b: list[str] = field(default_factory=list)
    pair_sets: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        return not any(value for name, value in vars(self).items() if name not in ("a", "b"))


def diff_caches(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> DiffReport:
    """What the caches at two paths or URLs have alike is left out; files, dates and provenance may differ.

    Digests are not checked: `verify` does that. Memory does not grow with the caches.
    """
    one, other = open_cache(a), open_cache(b)
    report = DiffReport(str(one), str(other))
    report.references_only_a, references, report.references_only_b = _split(
        one.references(), other.references()
    )
    for reference_id in references:
        difference = _compare_scores(one, other, reference_id)
        if not difference.is_none:
            report.scores[reference_id] = difference
    report.pair_sets_only_a, pair_sets, report.pair_sets_only_b = _split(one.pair_sets(), other.pair_sets())
    for name in pair_sets:
        if lines := _compare_pair_sets(one, other, name):
            report.pair_sets[name] = lines
    return report


def _split(one: Sequence[str], other: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    return sorted(set(one) - set(other)), sorted(set(one) & set(other)), sorted(set(other) - set(one))


Reader = Callable[[KeyRange], Values]


def _compare_scores(one: Cache, other: Cache, reference_id: str) -> ScoreDifference:
    shards = [_shards(cache, reference_id) for cache in (one, other)]
    if shards[0] == shards[1]:
        return ScoreDifference(0, 0, 0, 0, 0.0)
    readers = [
        lambda keys, cache=cache, names=names: join(shard_values(cache.folder, name, keys) for name in names)
        for cache, names in zip((one, other), shards, strict=True)
    ]
    num_bytes = sum(
        4 * count_rows(cache.folder, name)[1]
        for cache, names in zip((one, other), shards, strict=True)
        for name in names
    )
    return _compare(
        readers[0], readers[1], num_bytes, allowed_gap(one.read_reference(reference_id)["identity"])
    )


def _shards(cache: Cache, reference_id: str) -> list[str]:
    return [
        name
        for name in cache.folder.files(f"references/{reference_id}/scores")
        if classify(name)[0] == "shard"
    ]


def _compare(read_one: Reader, read_other: Reader, num_bytes: int, allowed: float) -> ScoreDifference:
    only_a = only_b = both = differing = 0
    largest = 0.0
    for keys in key_ranges(num_bytes):
        left, right = distinct(read_one(keys)), distinct(read_other(keys))
        in_right, in_left = matches(left, right.keys)
        gaps = largest_gaps(left.take(in_left), right.take(in_right))
        only_a, only_b, both = (
            only_a + len(left) - len(gaps),
            only_b + len(right) - len(gaps),
            both + len(gaps),
        )
        differing += int((~(gaps <= allowed)).sum())
        largest = max(largest, float(gaps.max(initial=0.0)))
    return ScoreDifference(only_a, only_b, both, differing, largest)


def _compare_pair_sets(one: Cache, other: Cache, name: str) -> list[str]:
    """A line for each thing that differs: rows, reference, tokenization, which pairs they are, and values."""
    left, right = (read_manifest(cache.folder, f"pairs/{name}") for cache in (one, other))
    lines = differing_fields(*({key: manifest[key] for key in TOLD} for manifest in (left, right)))
    parts = [[f"pairs/{name}/{part['file']}" for part in manifest["parts"]] for manifest in (left, right)]
    if parts[0] == parts[1] or left["reference"] != right["reference"]:
        return lines
    readers = [
        lambda keys, cache=cache, names=names: join(part_values(cache.folder, file, keys) for file in names)
        for cache, names in zip((one, other), parts, strict=True)
    ]
    allowed = allowed_gap(_identity(one, left))
    found = _compare(
        readers[0],
        readers[1],
        sum(part["bytes"] for manifest in (left, right) for part in manifest["parts"]),
        allowed,
    )
    if found.differing:
        lines.append(
            f"values: {found.differing} completions differ by up to {found.largest_gap:.2g} nats a token "
            f"(allowed {allowed:g})"
        )
    return lines


def _identity(cache: Cache, manifest: Document) -> Document:
    return (
        cache.read_reference(manifest["reference"])["identity"]
        if manifest["reference"] in cache.references()
        else {}
    )
