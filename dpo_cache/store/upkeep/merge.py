"""Several caches as one: everything that `a` and `b` hold, in `all`.

    merge_caches(["a", "s3://bucket/b"], "all")

Files named by their content are the same in every cache, so a merge copies the missing ones in any order.
Two things are not named by their content: a reference's entry, whose provenance may differ (the destination's
is kept, else the one whose bytes hash lowest), and a pair set. And two files may hold one completion with
values further apart than rounding explains: such caches are merged only with `prefer`, and files with other
values than the preferred ones are rewritten.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from dpo_cache.errors import CacheError, NotInCacheError, StorageError, printable
from dpo_cache.log import log_remark
from dpo_cache.store.cache import Cache, open_cache, read_reference
from dpo_cache.store.format.checks import check_details
from dpo_cache.store.format.documents import Document, digest_bytes, digest_json, seal_document
from dpo_cache.store.format.pair_tables import created_of, part_files
from dpo_cache.store.format.parquet import check_content, name_by_content
from dpo_cache.store.upkeep.compare import allowed_gap
from dpo_cache.store.upkeep.contents import classify, with_new_plans
from dpo_cache.store.upkeep.disagreements import (
    Disagreement,
    Holder,
    describe_disagreement,
    describe_undecided,
    files_with_values,
    find_disagreement,
)
from dpo_cache.store.upkeep.html import merge_html
from dpo_cache.store.upkeep.named_files import read_named_files
from dpo_cache.store.upkeep.open_runs import shards_of_runs
from dpo_cache.store.upkeep.preferred_values import rewrite_part, rewrite_shard

OnProgress = Callable[[int, int], None]  # bytes copied, of how many
Candidate = tuple[Cache, Document]  # a cache, and the manifest of its pair set


@dataclass
class MergeReport:
    """Counts of the files that a merge copied."""

    cache: str
    copied_files: int = 0
    copied_bytes: int = 0
    present_files: int = 0
    references: list[str] = field(default_factory=list)  # new to the destination
    pair_sets: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)  # pair sets preferred to others of the same name
    # completions by reference of which another cache's value was preferred
    overruled: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"<MergeReport of {self.cache}: {self.copied_files:,} files copied, {len(self.references):,} new "
            f"references, {len(self.pair_sets):,} new pair sets>"
        )

    def _repr_html_(self) -> str:
        return merge_html(self)


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
    do not, or where values of one completion differ by more than the dtype's rounding explains, nothing is
    copied and `CacheError` lists them, unless `prefer` is `src` (the last source's is taken) or `dest` (the
    destination's stays). For pair sets, `rename` instead adds to each name the first characters of its
    digest. The digest of every file is checked as it is copied: raises `CorruptShardError`. Others may change
    the caches meanwhile: what they removed although a manifest of this merge names it is copied again.
    """
    target, origins = open_cache(destination, create=True), [open_cache(source) for source in sources]
    report = MergeReport(str(target))

    def merge() -> MergeReport:
        nonlocal report
        report = MergeReport(str(target), report.copied_files, report.copied_bytes)
        plan = _Merge(target, target.folder.files(), report)
        plan.plan_scores(origins)
        manifests = [_read_checked_manifests(cache) for cache in (target, *origins)]
        plan.compare_values([target, *origins], manifests, prefer)
        plan.plan_pairs([target, *origins], manifests, prefer, rename)
        plan.copy(on_progress or (lambda *_: None))
        return report

    return with_new_plans(merge)


@dataclass
class _Merge:
    """The files that the destination lacks, and their sources; references and manifests are held as bytes."""

    target: Cache
    present: dict[str, int]
    report: MergeReport
    files: dict[str, tuple[Cache, str]] = field(default_factory=dict)  # shards, parts: cache, name there
    references: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    # files that these manifests name, though the destination may have them: cache, name in it
    named: dict[str, tuple[Cache, str]] = field(default_factory=dict)
    disagreements: dict[str, Disagreement] = field(default_factory=dict)  # by reference
    # pair sets with values that are not preferred: cache, their manifest there, and their new one
    rewritten: list[tuple[Cache, Document, Document]] = field(default_factory=list)

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
                    self.references[file] = min(content, known, key=digest_bytes)
                self.report.present_files += file in self.present
        self.report.references = sorted(classify(file)[1][0] for file in self.references)
        leftovers = [file for file in self.files if not self._has_reference(classify(file)[1][0])]
        if leftovers:
            log_remark(
                f"{len(leftovers)} files of scores are not copied, because no cache here has the entry of "
                f"their reference, such as {leftovers[0]}: they are left by a command that was killed."
            )
        for file in leftovers:
            del self.files[file]

    def compare_values(
        self, caches: list[Cache], manifests: list[dict[str, Document]], prefer: str | None
    ) -> None:
        """Find the completions on which the caches disagree. Raises `CacheError` unless `prefer` decides."""
        ranked = list(zip(caches, manifests, strict=True))[:: -1 if prefer == "src" else 1]
        files: dict[str, list[Holder]] = {}
        for cache, of_cache in ranked:
            for reference, held in files_with_values(cache, of_cache).items():
                files.setdefault(reference, []).append(Holder(cache, held))
        undecided = []
        for reference, holders in sorted(files.items()):
            found = find_disagreement(holders, allowed_gap(self._identity_of(reference, holders)))
            if not len(found):
                continue
            self.disagreements[reference] = found
            self.report.overruled[reference] = len(found)
            is_decided = prefer == "src" or (
                prefer == "dest" and all(holders[first].cache is self.target for first, _ in found.between)
            )
            if not is_decided:
                undecided.append(describe_disagreement(reference, found, holders))
        if undecided:
            raise CacheError(describe_undecided(undecided, prefer))
        self._check_no_run_at_work()

    def plan_pairs(
        self, caches: list[Cache], manifests: list[dict[str, Document]], prefer: str | None, rename: bool
    ) -> None:
        """Choose the pair set for each name in the destination, and the files to copy for it."""
        offered: dict[str, list[Candidate]] = {}
        for cache, of_cache in zip(caches, manifests, strict=True):
            for name, manifest in of_cache.items():
                offered.setdefault(name, []).append((cache, manifest))
        conflicts = []
        for name, candidates in sorted(offered.items()):
            self._check_readable(name, candidates)
            if len({_identity(manifest) for _, manifest in candidates}) == 1:
                self._plan_one(*self._first([*filter(self._has_parts, candidates)] or candidates))
            elif rename:
                self._plan_renamed(name, candidates)
            elif prefer == "src" or (prefer == "dest" and candidates[0][0] is self.target):
                self.report.kept.append(name)
                self._plan_one(*candidates[-1 if prefer == "src" else 0])
            else:
                conflicts.append((name, candidates))
        if conflicts:
            raise CacheError(_describe_conflicts(conflicts, prefer))

    def _check_readable(self, name: str, candidates: list[Candidate]) -> None:
        """Raise `StorageError` if the destination has a pair set of this name that this user cannot read."""
        is_held = f"pairs/{name}/manifest.json" in self.present
        if is_held and not any(cache is self.target for cache, _ in candidates):
            raise StorageError(
                f"{self.target}: it has a pair set {name} that cannot be read, so it is not known whether it "
                f"is that of {candidates[0][0]}; nothing was copied.\nAsk its owner to let you read it."
            )

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
        name = f"{manifest['name']}/{manifest['split']}"
        original = {**manifest, "name": (source_name or name).partition("/")[0]}
        has_other_values = self._has_other_values(original)
        if has_other_values:
            self.rewritten.append((cache, original, manifest))
        if cache is self.target:
            return
        if not self._has_reference(manifest["reference"]):
            raise NotInCacheError(
                f"{cache}: pair set {name} was scored by a reference that is not there.\n"
                f"Run `dpo-cache verify {cache}`."
            )
        self.report.pair_sets.append(name)
        if has_other_values:
            return
        entry = f"references/{manifest['reference']}/reference.json"
        self.named[entry] = cache, entry
        for file, part in part_files(manifest).items():
            self.named[file] = cache, f"pairs/{source_name or name}/{part['file']}"
            if file not in self.present:
                self.files[file] = self.named[file]
        self.manifests[f"pairs/{name}/manifest.json"] = seal_document(manifest)

    def copy(self, on_progress: OnProgress) -> None:
        """Publish in an order that leaves a valid cache where it is interrupted: entries before scores, parts
        before manifests.
        """
        total = sum(origin.folder.size(source) for origin, source in self.files.values())
        if self.references or self.manifests or self.files or self.rewritten:
            self.target.publish_format()
        for file, content in sorted(self.references.items()):
            self._publish(file, content)
        done = 0
        for file in sorted(self.files):
            origin, source = self.files[file]
            content = origin.folder.read(source)
            check_content(content, file, f"{origin}/{source}")
            if self._is_overruled_shard(file):
                self._rewrite_shard(origin, source)
            else:
                self._publish(file, content)
            done += len(content)
            on_progress(done, total)
        overruled = [file for file in self.present if self._is_overruled_shard(file)]
        for file in overruled:
            self._rewrite_shard(self.target, file)
        for cache, original, manifest in self.rewritten:
            self._rewrite_parts(cache, original, manifest)
        for file, content in sorted(self.manifests.items()):
            self._publish(file, content)
        self._publish_removed()
        for file in overruled:  # its other values are durable in new files by now
            self.target.folder.remove(file)

    def _publish_removed(self) -> None:
        """Publish what others removed before the manifests named it. Whoever removes a file looks at the
        manifests afterwards, see `removal.py`, so one of the two notices the other.
        """
        for file, (origin, source) in self.named.items():
            if not self.target.folder.exists(file):
                self._publish(file, origin.folder.read(source))

    def _rewrite_shard(self, cache: Cache, file: str) -> None:
        reference = classify(file)[1][0]
        content = rewrite_shard(cache.folder, file, self.disagreements[reference].preferred)
        if content is not None:
            new = f"references/{reference}/scores/{name_by_content(content)}"
            if new not in self.present:
                self._publish(new, content)

    def _rewrite_parts(self, cache: Cache, original: Document, manifest: Document) -> None:
        """Publish a pair set's parts with the preferred values, and plan its manifest."""
        found = self.disagreements[manifest["reference"]]
        place, parts = f"pairs/{manifest['name']}/{manifest['split']}", []
        for file, part in part_files(original).items():
            if found.is_in(file):
                content = rewrite_part(cache.folder, file, found.preferred)
            else:
                content = cache.folder.read(file)
                check_content(content, file, f"{cache}/{file}")
            new = {**part, "file": name_by_content(content), "bytes": len(content)}
            if f"{place}/{new['file']}" not in self.present:
                self._publish(f"{place}/{new['file']}", content)
            parts.append(new)
        renewed = {name: value for name, value in manifest.items() if name != "audit"} | {"parts": parts}
        self.manifests[f"{place}/manifest.json"] = seal_document(renewed)

    def _is_overruled_shard(self, file: str) -> bool:
        """Return whether the file is a shard with other values than the preferred ones."""
        kind, names = classify(file)
        return kind == "shard" and names[0] in self.disagreements and self.disagreements[names[0]].is_in(file)

    def _has_other_values(self, manifest: Document) -> bool:
        found = self.disagreements.get(manifest["reference"])
        return found is not None and any(map(found.is_in, part_files(manifest)))

    def _check_no_run_at_work(self) -> None:
        """Raise `CacheError` if a run of `precompute` may yet withdraw a shard to be rewritten."""
        for reference in self.disagreements:
            for file in shards_of_runs(self.target.folder, reference) & self.present.keys():
                if self._is_overruled_shard(file):
                    raise CacheError(
                        f"{self.target}/{file}: a run of `dpo-cache precompute` is at work on these scores, "
                        "or was killed in its audit; nothing was copied.\n"
                        "Let it end, or give its command again, and then merge."
                    )

    def _identity_of(self, reference: str, holders: list[Holder]) -> Document:
        """The reference's identity, from the first cache that has its entry; empty where none has."""
        for holder in holders:
            with suppress(NotInCacheError):
                return read_reference(holder.cache.folder, reference)["identity"]
        return {}

    def _publish(self, file: str, content: bytes) -> None:
        self.target.folder.publish(file, content)
        self.report.copied_files += 1
        self.report.copied_bytes += len(content)

    def _has_reference(self, reference_id: str) -> bool:
        """Return whether the destination has the reference's entry, or will have it."""
        entry = f"references/{reference_id}/reference.json"
        return entry in self.present or entry in self.references

    def _has_parts(self, candidate: Candidate) -> bool:
        """False where the destination lacks a part of its pair set, which another cache may have."""
        cache, manifest = candidate
        return cache is not self.target or part_files(manifest).keys() <= self.present.keys()

    def _first(self, candidates: list[Candidate]) -> Candidate:
        """The destination's, else the one whose manifest hashes lowest, in any order of the sources; of those
        with the same parts, the one with the newest settings.
        """

        def rank(entry: Candidate) -> tuple[bool, str]:
            return entry[0] is not self.target, digest_json(entry[1])

        first = min(candidates, key=rank)
        alike = [entry for entry in candidates if entry[1]["parts"] == first[1]["parts"]]
        last = max(created_of(manifest) for _, manifest in alike)
        return min((entry for entry in alike if created_of(entry[1]) == last), key=rank)


def _read_checked_manifests(cache: Cache) -> dict[str, Document]:
    """The manifests that this user may read; the others are named in a remark."""
    named = read_named_files(cache.folder)
    if named.unreadable:
        place, why = next(iter(named.unreadable.items()))
        log_remark(
            f"{cache}: {len(named.unreadable)} pair sets or folders of them cannot be read and are left out, "
            f"such as {place}: {why}"
        )
    manifests = named.manifests
    for name, manifest in manifests.items():
        check_details(manifest, f"{cache}/pairs/{name}/manifest.json")
    return manifests


def _identity(manifest: Document) -> str:
    """Equal for pair sets of the same pairs, in the same order, under the same reference."""
    return digest_json([manifest["reference"], manifest["pairs_digest"]])


def _describe_conflicts(conflicts: list[tuple[str, list[Candidate]]], prefer: str | None) -> str:
    lines = []
    for name, candidates in conflicts:
        for cache, manifest in candidates:
            scored = f"{manifest['num_pairs']:,} pairs of reference {manifest['reference'][:12]}"
            created = printable(manifest["source"].get("created", "undated"))
            lines.append(f"  {name} in {cache}: {scored}, {created}")
    count = f"{len(conflicts)} pair sets have" if len(conflicts) > 1 else "one pair set has"
    lines.append(
        "The destination has none to prefer: keep all with `rename`, or the last source's with `prefer` src."
        if prefer
        else "Keep all with `rename`, or one with `prefer` src or `prefer` dest."
    )
    return f"{count} another content in another cache; nothing was copied:\n" + "\n".join(lines)
