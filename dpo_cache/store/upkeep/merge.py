"""Several caches as one: everything that `a` and `b` hold, in `all`.

    merge_caches(["a", "s3://bucket/b"], "all")

Files named by their content are the same wherever they lie, so a union is a copy of what is missing, and its
order does not matter. Two things have a name that is not their content: a reference's entry, whose identity
is the same but whose provenance may not be (the destination's is kept, else the one whose bytes hash lowest),
and a pair set.
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
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.format.parquet import check_content
from dpo_cache.store.upkeep.contents import classify

OnProgress = Callable[[int, int], None]  # bytes copied, of how many


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
    kept: list[str] = field(default_factory=list)  # pair sets of which another one of that name was left out

    def __repr__(self) -> str:
        return (
            f"<MergeReport of {self.cache}: {self.copied_files:,} files copied, {len(self.references):,} new "
            f"references, {len(self.pair_sets):,} new pair sets>"
        )


@dataclass
class _Plan:
    """Every file that the destination lacks, and where to take it from; what is sealed or renamed comes as
    bytes.
    """

    shards: dict[str, Cache] = field(default_factory=dict)
    references: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, tuple[Cache, str]] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)


def merge_caches(
    sources: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    prefer: str | None = None,
    rename: bool = False,
    on_progress: OnProgress | None = None,
) -> MergeReport:
    """Copy to the destination what it lacks of the sources. The sources may stand in any order; a second
    merge copies nothing.

    Pair sets of one name are one pair set where they hold the same pairs under the same reference. Where they
    do not, nothing is copied and `CacheError` lists them, unless `prefer` says `src` (the last source's is
    taken) or `dest` (the destination's stays), or `rename` keeps each under its name and the first characters
    of its digest. The digest of every file is checked as it is copied: raises `CorruptShardError`.
    """
    target, origins = open_cache(destination, create=True), [open_cache(source) for source in sources]
    report, plan = MergeReport(str(target)), _Plan()
    present = target.folder.files()
    _plan_scores(plan, report, origins, present)
    _plan_pairs(plan, report, origins, target, present, prefer, rename)
    _copy(plan, report, target, on_progress or (lambda *_: None))
    return report


def _plan_scores(plan: _Plan, report: MergeReport, origins: list[Cache], present: dict[str, int]) -> None:
    for origin in origins:
        for file in origin.folder.files("references"):
            kind, parts = classify(file)
            if kind == "shard" and file not in present:
                plan.shards[file] = origin
            elif kind == "reference" and file not in present:
                read_reference(origin.folder, parts[0])  # raises where it is damaged
                content = origin.folder.read(file)
                plan.references[file] = min(content, plan.references.get(file, content), key=_digest)
            report.present_files += file in present
    report.references = sorted(classify(file)[1][0] for file in plan.references)
    for shard, origin in plan.shards.items():
        entry = f"references/{classify(shard)[1][0]}/reference.json"
        if entry not in present and entry not in plan.references:
            raise NotInCacheError(
                f"{origin}/{shard}: scores of a reference that no cache here describes.\n"
                f"Run `dpo-cache verify {origin}`."
            )


def _plan_pairs(
    plan: _Plan,
    report: MergeReport,
    origins: list[Cache],
    target: Cache,
    present: dict[str, int],
    prefer: str | None,
    rename: bool,
) -> None:
    """Which pair set each name stands for in the destination, and the files of those it lacks."""
    offered: dict[str, list[tuple[Cache, Document]]] = {}
    for cache in [target, *origins]:
        for name in cache.pair_sets():
            offered.setdefault(name, []).append(
                (
                    cache,
                    check_details(
                        read_manifest(cache.folder, f"pairs/{name}"), f"{cache}/pairs/{name}/manifest.json"
                    ),
                )
            )
    conflicts = []
    for name, candidates in sorted(offered.items()):
        if len({_identity(manifest) for _, manifest in candidates}) == 1:
            _plan_one(plan, report, name, *_first(candidates, target), target, present)
        elif rename:
            _plan_renamed(plan, report, name, candidates, target, present)
        elif prefer == "src" or (prefer == "dest" and candidates[0][0] is target):
            chosen = candidates[-1] if prefer == "src" else candidates[0]
            report.kept.append(name)
            _plan_one(plan, report, name, *chosen, target, present)
        else:
            conflicts.append((name, candidates))
    if conflicts:
        raise CacheError(_describe_conflicts(conflicts, prefer))


def _plan_renamed(
    plan: _Plan,
    report: MergeReport,
    name: str,
    candidates: list[tuple[Cache, Document]],
    target: Cache,
    present: dict[str, int],
) -> None:
    """Each under a name of its own, but for the destination's, which keeps its."""
    by_identity: dict[str, list[tuple[Cache, Document]]] = {}
    for cache, manifest in candidates:
        by_identity.setdefault(_identity(manifest), []).append((cache, manifest))
    for identity, alike in sorted(by_identity.items()):
        if alike[0][0] is target:
            continue
        cache, manifest = _first(alike, target)
        renamed = {**manifest, "name": f"{manifest['name'][:119]}-{identity[:8]}"}
        new_name = f"{renamed['name']}/{manifest['split']}"
        report.renamed[f"{name} of {cache}"] = new_name
        _plan_one(plan, report, new_name, cache, renamed, target, present, source_place=f"pairs/{name}")


def _plan_one(
    plan: _Plan,
    report: MergeReport,
    name: str,
    cache: Cache,
    manifest: Document,
    target: Cache,
    present: dict[str, int],
    source_place: str | None = None,
) -> None:
    place = f"pairs/{name}"
    if cache is target or (source_place and f"{place}/manifest.json" in present):
        return
    reference = f"references/{manifest['reference']}/reference.json"
    if reference not in present and reference not in plan.references:
        raise NotInCacheError(
            f"{cache}: pair set {name} was scored by a reference that is not there.\n"
            f"Run `dpo-cache verify {cache}`."
        )
    for part in manifest["parts"]:
        if f"{place}/{part['file']}" not in present:
            plan.parts[f"{place}/{part['file']}"] = cache, f"{source_place or place}/{part['file']}"
    plan.manifests[f"{place}/manifest.json"] = seal_document(manifest)
    report.pair_sets.append(name)


def _copy(plan: _Plan, report: MergeReport, target: Cache, on_progress: OnProgress) -> None:
    """Publish in an order that leaves a valid cache wherever it is cut off: entries before scores, parts
    before manifests.
    """
    from_where = [(file, origin, file) for file, origin in plan.shards.items()]
    from_where += [(file, origin, source) for file, (origin, source) in plan.parts.items()]
    total = sum(origin.folder.size(source) for _, origin, source in from_where)
    if plan.references or plan.manifests or from_where:
        target.publish_format()
    for file, content in sorted(plan.references.items()):
        _publish(report, target, file, content)
    done = 0
    for file, origin, source in sorted(from_where, key=lambda entry: entry[0]):
        content = origin.folder.read(source)
        check_content(content, file.rpartition("/")[2], f"{origin}/{source}")
        _publish(report, target, file, content)
        done += len(content)
        on_progress(done, total)
    for file, content in sorted(plan.manifests.items()):
        _publish(report, target, file, content)


def _publish(report: MergeReport, target: Cache, file: str, content: bytes) -> None:
    target.folder.publish(file, content)
    report.copied_files += 1
    report.copied_bytes += len(content)


def _identity(manifest: Document) -> str:
    """What makes two pair sets one: the same pairs, in the same order, under the same reference."""
    return digest_json([manifest["reference"], manifest["pairs_digest"]])


def _first(candidates: list[tuple[Cache, Document]], target: Cache) -> tuple[Cache, Document]:
    """The destination's, else the one whose manifest hashes lowest, wherever its cache stands among the
    sources.
    """
    return min(candidates, key=lambda candidate: (candidate[0] is not target, digest_json(candidate[1])))


def _describe_conflicts(conflicts: list[tuple[str, list[tuple[Cache, Document]]]], prefer: str | None) -> str:
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
