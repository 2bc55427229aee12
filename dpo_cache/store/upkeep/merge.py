"""Several caches as one: everything that `a` and `b` hold, in `all`.

    merge_caches(["a", "s3://bucket/b"], "all")

Files named by their content are the same in every cache, so a merge copies the missing ones in any order.
Two things are not named by their content: a reference's entry, whose provenance may differ (the destination's
is kept, else the one whose bytes hash lowest), and a pair set.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dpo_cache.errors import CacheError, NotInCacheError
from dpo_cache.store.cache import Cache, open_cache, read_reference
from dpo_cache.store.format.checks import check_details
from dpo_cache.store.format.documents import Document, digest_json, seal_document
from dpo_cache.store.format.pair_tables import part_files
from dpo_cache.store.format.parquet import check_content
from dpo_cache.store.upkeep.contents import classify, read_manifests

OnProgress = Callable[[int, int], None]  # bytes copied, of how many
Candidate = tuple[Cache, Document]  # a cache, and the manifest of its pair set


@dataclass
class MergeReport:
    """What a merge copied."""

    cache: str
    copied_files: int = 0
    copied_bytes: int = 0
    present_files: int = 0
    references: list[str] = field(default_factory=list)  # that the destination did not have
    pair_sets: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)  # pair sets preferred to others of the same name

    def __repr__(self) -> str:
        return (
            f"<MergeReport of {self.cache}: {self.copied_files:,} files copied, {len(self.references):,} new "
            f"references, {len(self.pair_sets):,} new pair sets>"
        )


def merge_caches(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    prefer: str | None = None,
    rename: bool = False,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Copy to the destination what it lacks of the sources. Their order does not matter; a second merge
    copies nothing.

    Pair sets of one name are one pair set where they hold the same pairs under the same reference. Where they
    do not, nothing is copied and `CacheError` lists them, unless `prefer` is `src` (the last source's is
    taken) or `dest` (the destination's stays), or `rename` adds to each name the first characters of its
    digest. The digest of every file is checked as it is copied: raises `CorruptShardError`.
    """
    target, origins = open_cache(destination, create=True), [open_cache(source) for source in sources]
    merge = _Merge(target, target.folder.files(), MergeReport(str(target)))
    merge.plan_scores(origins)
    merge.plan_pairs(origins, prefer, rename)
    merge.copy(on_progress or (lambda *_: None))
    return merge.report


@dataclass
class _Merge:
    """The files that the destination lacks, and their sources; references and manifests are held as bytes."""

    target: Cache
    present: dict[str, int]
    report: MergeReport
    files: dict[str, tuple[Cache, str]] = field(default_factory=dict)  # shards, parts: cache, name there
    references: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)

    def plan_scores(self, origins: list[Cache]) -> None:
        for origin in origins:
            for file in origin.folder.files("references"):
                kind, parts = classify(file)
                if kind == "shard" and file not in self.present:
                    self.files[file] = origin, file
                elif kind == "reference" and file not in self.present:
                    read_reference(origin.folder, parts[0])  # raises where it is damaged
                    content = origin.folder.read(file)
                    known = self.references.get(file, content)
                    self.references[file] = min(content, known, key=_digest)
                self.report.present_files += file in self.present
        self.report.references = sorted(classify(file)[1][0] for file in self.references)
        for shard, (origin, _) in self.files.items():
            if not self._has_reference(classify(shard)[1][0]):
                raise NotInCacheError(
                    f"{origin}/{shard}: scores of a reference that no cache here describes.\n"
                    f"Run `dpo-cache verify {origin}`."
                )

    def plan_pairs(self, origins: list[Cache], prefer: str | None, rename: bool) -> None:
        """Choose the pair set for each name in the destination, and the files to copy for it."""
        offered: dict[str, list[Candidate]] = {}
        for cache in [self.target, *origins]:
            for name, manifest in read_manifests(cache).items():
                check_details(manifest, f"{cache}/pairs/{name}/manifest.json")
                offered.setdefault(name, []).append((cache, manifest))
        conflicts = []
        for name, candidates in sorted(offered.items()):
            if len({_identity(manifest) for _, manifest in candidates}) == 1:
                self._plan_one(*self._first(candidates))
            elif rename:
                self._plan_renamed(name, candidates)
            elif prefer == "src" or (prefer == "dest" and candidates[0][0] is self.target):
                self.report.kept.append(name)
                self._plan_one(*candidates[-1 if prefer == "src" else 0])
            else:
                conflicts.append((name, candidates))
        if conflicts:
            raise CacheError(_describe_conflicts(conflicts, prefer))

    def _plan_renamed(self, name: str, candidates: list[Candidate]) -> None:
        """Give each its own name, except for the destination's, which keeps its name."""
        by_identity: dict[str, list[Candidate]] = {}
        for cache, manifest in candidates:
            by_identity.setdefault(_identity(manifest), []).append((cache, manifest))
        for identity, alike in sorted(by_identity.items()):
            if alike[0][0] is not self.target:
                cache, manifest = self._first(alike)
                renamed = {**manifest, "name": f"{manifest['name'][:119]}-{identity[:8]}"}
                new_name = f"{renamed['name']}/{manifest['split']}"
                self.report.renamed[f"{name} of {cache}"] = new_name
                if f"pairs/{new_name}/manifest.json" not in self.present:
                    self._plan_one(cache, renamed, source_name=name)

    def _plan_one(self, cache: Cache, manifest: Document, source_name: str | None = None) -> None:
        if cache is self.target:
            return
        name = f"{manifest['name']}/{manifest['split']}"
        if not self._has_reference(manifest["reference"]):
            raise NotInCacheError(
                f"{cache}: pair set {name} was scored by a reference that is not there.\n"
                f"Run `dpo-cache verify {cache}`."
            )
        for file, part in part_files(manifest).items():
            if file not in self.present:
                self.files[file] = cache, f"pairs/{source_name or name}/{part['file']}"
        self.manifests[f"pairs/{name}/manifest.json"] = seal_document(manifest)
        self.report.pair_sets.append(name)

    def copy(self, on_progress: OnProgress) -> None:
        """Publish in an order that leaves a valid cache where it is interrupted: entries before scores, parts
        before manifests.
        """
        total = sum(origin.folder.size(source) for origin, source in self.files.values())
        if self.references or self.manifests or self.files:
            self.target.publish_format()
        for file, content in sorted(self.references.items()):
            self._publish(file, content)
        done = 0
        for file in sorted(self.files):
            origin, source = self.files[file]
            content = origin.folder.read(source)
            check_content(content, file, f"{origin}/{source}")
            self._publish(file, content)
            done += len(content)
            on_progress(done, total)
        for file, content in sorted(self.manifests.items()):
            self._publish(file, content)

    def _publish(self, file: str, content: bytes) -> None:
        self.target.folder.publish(file, content)
        self.report.copied_files += 1
        self.report.copied_bytes += len(content)

    def _has_reference(self, reference_id: str) -> bool:
        """Whether the destination has the reference's entry, or will have it."""
        entry = f"references/{reference_id}/reference.json"
        return entry in self.present or entry in self.references

    def _first(self, candidates: list[Candidate]) -> Candidate:
        """The destination's, else the one whose manifest hashes lowest, in any order of the sources."""
        return min(candidates, key=lambda entry: (entry[0] is not self.target, digest_json(entry[1])))


def _identity(manifest: Document) -> str:
    """Equal for pair sets of the same pairs, in the same order, under the same reference."""
    return digest_json([manifest["reference"], manifest["pairs_digest"]])


def _describe_conflicts(conflicts: list[tuple[str, list[Candidate]]], prefer: str | None) -> str:
    lines = []
    for name, candidates in conflicts:
        for cache, manifest in candidates:
            scored = f"{manifest['num_pairs']:,} pairs of reference {manifest['reference'][:12]}"
            lines.append(f"  {name} in {cache}: {scored}, {manifest['source'].get('created', 'undated')}")
    count = f"{len(conflicts)} pair sets have" if len(conflicts) > 1 else "one pair set has"
    lines.append(
        "The destination has none to prefer: keep all with `rename`, or the last source's with `prefer` src."
        if prefer
        else "Keep all with `rename`, or one with `prefer` src or `prefer` dest."
    )
    return f"{count} another content in another cache; nothing was copied:\n" + "\n".join(lines)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
