"""Compare two caches: entries that only one of them has, and values in which they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dpo_cache.store.cache import Cache, open_cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.pair_tables import part_files, read_manifest
from dpo_cache.store.upkeep.compare import allowed_gap, largest_gaps, values_of
from dpo_cache.store.upkeep.contents import shard_files
from dpo_cache.store.upkeep.key_ranges import key_starts, rows_by_key

# members of a manifest; its source and date are provenance, not content
COMPARED = ("num_pairs", "reference", "pairs_digest", "tokenization")


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
    """The differences between two caches. Empty lists and dicts where there are none."""

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
    """The differences between the caches at two paths or URLs, without files, dates and provenance.

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


def _compare_scores(one: Cache, other: Cache, reference_id: str) -> ScoreDifference:
    shards = [(cache.folder, list(shard_files(cache.folder, reference_id))) for cache in (one, other)]
    if shards[0][1] == shards[1][1]:
        return ScoreDifference(0, 0, 0, 0, 0.0)
    return _compare(shards, allowed_gap(one.read_reference(reference_id)["identity"]))


def _compare(files: Sequence[tuple[Folder, list[str]]], allowed: float) -> ScoreDifference:
    """The difference between the values in the first cache's files and in the second's."""
    only_a = only_b = both = differing = 0
    largest = 0.0
    for table in rows_by_key([(folder, name) for folder, names in files for name in names]):
        values = values_of(table)
        is_first, first = key_starts(values.keys)
        is_of_b = values.source >= len(files[0][1])
        # a completion's first rows in both caches: those of one cache come before those of the other
        is_first_of_b = is_of_b & (is_first | ~np.concatenate([[False], is_of_b[:-1]]))
        here = np.flatnonzero(is_first_of_b & ~is_first)
        gaps = largest_gaps(values, first[here], here)
        only_a += int((is_first & ~is_of_b).sum()) - len(gaps)
        only_b += int((is_first & is_of_b).sum())
        both += len(gaps)
        differing += int((~(gaps <= allowed)).sum())
        largest = max(largest, float(gaps.max(initial=0.0)))
    return ScoreDifference(only_a, only_b, both, differing, largest)


def _compare_pair_sets(one: Cache, other: Cache, name: str) -> list[str]:
    """A line for each thing that differs: rows, reference, tokenization, which pairs they are, and values."""
    left, right = (read_manifest(cache.folder, f"pairs/{name}") for cache in (one, other))
    lines = differing_fields(*({key: manifest.get(key) for key in COMPARED} for manifest in (left, right)))
    if left["parts"] == right["parts"] or left["reference"] != right["reference"]:
        return lines
    is_known = left["reference"] in one.references()
    allowed = allowed_gap(one.read_reference(left["reference"])["identity"] if is_known else {})
    parts = [(one.folder, list(part_files(left))), (other.folder, list(part_files(right)))]
    found = _compare(parts, allowed)
    if found.differing:
        lines.append(
            f"values: {found.differing} completions differ by up to {found.largest_gap:.2g} nats a token "
            f"(allowed {allowed:g})"
        )
    return lines
