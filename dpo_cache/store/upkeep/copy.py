"""Copies of a cache, or of some of it, between a local folder and an object store.

Only files that the target lacks are sent, each checked against its digest. A file is sent after the files
that it refers to: format.json, reference.json, score shards, parts of pair sets, manifests. So an interrupted
copy is a valid cache, and the same call resumes it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain

from dpo_cache.errors import CacheError, MissingFileError, NotInCacheError, StorageError
from dpo_cache.store.cache import Cache
from dpo_cache.store.format.documents import Document, seal_document
from dpo_cache.store.format.pair_tables import created_of, part_files
from dpo_cache.store.format.parquet import check_content
from dpo_cache.store.upkeep.contents import shard_files
from dpo_cache.store.upkeep.html import transfer_html

THREADS = 8
LARGE_BYTES = 64 << 20  # larger files are sent one at a time, because each is held in memory
PLANS = 3  # while the source is compacted or collected

OnProgress = Callable[["TransferProgress"], None]


@dataclass(frozen=True)
class TransferProgress:
    """Files and bytes that are sent, and in all."""

    num_files: int
    total_files: int
    num_bytes: int
    total_bytes: int
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / max(self.elapsed_s, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.total_bytes - self.num_bytes) / max(self.bytes_per_s, 1e-9)


@dataclass
class TransferReport:
    """The files that a copy sent, and those that were present."""

    source: str
    target: str
    references: list[str] = field(default_factory=list)  # ids
    scored_references: list[str] = field(default_factory=list)  # those whose scores are copied, too
    pair_sets: list[str] = field(default_factory=list)
    files_sent: int = 0
    bytes_sent: int = 0
    files_present: int = 0
    bytes_present: int = 0
    elapsed_s: float = 0.0

    def __repr__(self) -> str:
        return (
            f"<TransferReport {self.source} -> {self.target}: {self.files_sent:,} files sent, "
            f"{self.files_present:,} present>"
        )

    def _repr_html_(self) -> str:
        return transfer_html(self)


@dataclass(frozen=True)
class _Plan:
    """Files to send, with their sizes, in groups: one is finished before the next one starts. The last group
    are `manifests`, with their bytes.
    """

    groups: list[dict[str, int]]
    present: dict[str, int]
    manifests: dict[str, bytes]


def copy_cache(
    source: Cache,
    target: Cache,
    *,
    pairs: Sequence[str] = (),
    references: Sequence[str] = (),
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> TransferReport:
    """Send what the target lacks: these pair sets (with the references that they name, without scores) and
    these references (with their scores); everything where neither is named.

    Raises `CacheError` before anything is sent where the target holds another pair set of the same name,
    unless `overwrite`; `CorruptShardError` for a file of the source that is damaged: it is not sent. Others
    may change both caches meanwhile: a pair set is sent as it was when it was chosen, and if they removed
    files that the target had and a sent manifest names, those are sent, too.
    """
    started = time.monotonic()
    report = TransferReport(str(source), str(target))
    sender = _Sender(source, target, report, on_progress or (lambda _: None), started)
    manifests = _choose(source, report, pairs, references)
    sent: set[str] = set()
    for attempt in range(1, PLANS + 1):
        try:
            plan = _plan(source, target, report, manifests, _changed(target, manifests, sent, overwrite))
            sent |= plan.manifests.keys()
            sender.send(plan)
            if not plan.manifests:  # else the next plan sees whether all that they name is still there
                break
        except MissingFileError:  # compacted, collected or replaced since
            if attempt == PLANS:
                raise
            manifests = _choose(source, report, pairs, references)
    else:
        raise StorageError(
            f"{target}: other processes remove or replace pair sets as fast as they are copied.\n"
            "Run the same command again."
        )
    report.elapsed_s = time.monotonic() - started
    return report


def _choose(
    source: Cache, report: TransferReport, pairs: Sequence[str], references: Sequence[str]
) -> dict[str, Document]:
    """The manifests of the chosen pair sets by name; the report takes the names and ids."""
    is_all = not pairs and not references
    chosen = [source.pairs(name) for name in (source.pair_sets() if is_all else pairs)]
    report.scored_references = (
        source.references() if is_all else [source.find_reference(prefix) for prefix in references]
    )
    needed = {*report.scored_references, *(pair_set.reference_id for pair_set in chosen)}
    report.references = sorted(needed)
    report.pair_sets = sorted({pair_set.name for pair_set in chosen})
    if not needed:
        raise NotInCacheError(
            f"{source}: nothing to copy: no references and no pair sets.\nRun `dpo-cache precompute` first."
        )
    for reference_id in report.references:
        source.read_reference(reference_id)  # raises where it is damaged
    return {pair_set.name: pair_set.manifest for pair_set in chosen}


def _changed(
    target: Cache, manifests: dict[str, Document], sent: Collection[str], overwrite: bool
) -> list[str]:
    """Pair sets to be replaced at the target, also those whose settings are newer at the source. Raises
    `CacheError` if one is of other content and not of the manifests that were sent, unless `overwrite`.
    """
    held = {name: _held_manifest(target, name) for name in manifests}
    changed = [name for name, manifest in manifests.items() if _is_other(held[name], manifest)]
    newer = [name for name, manifest in manifests.items() if _is_newer(held[name], manifest)]
    others = [name for name in changed if f"pairs/{name}/manifest.json" not in sent]
    if others and not overwrite:
        raise CacheError(
            f"{target}: {', '.join(others)} is there already with other content.\n"
            "Overwrite it (`overwrite`), or copy other pair sets (`pairs`)."
        )
    return [*changed, *newer]


def _held_manifest(target: Cache, name: str) -> Document | None:
    """The manifest of the target's pair set of this name, if there is one."""
    try:
        return target.pairs(name).manifest
    except NotInCacheError:
        return None


def _is_newer(held: Document | None, manifest: Document) -> bool:
    """Return whether the manifest says later than that of the target how the same pairs were made."""
    return (
        held is not None
        and held != manifest
        and not _is_other(held, manifest)
        and created_of(manifest) >= created_of(held)
    )


def _is_other(held: Document | None, manifest: Document) -> bool:
    """Return whether the target holds a pair set of this name with other pairs, scores or reference."""
    return held is not None and any(
        held.get(member) != manifest.get(member) for member in ("reference", "pairs_digest", "parts")
    )


def _plan(
    source: Cache,
    target: Cache,
    report: TransferReport,
    manifests: dict[str, Document],
    changed: Sequence[str],
) -> _Plan:
    """The files to send. Parts come from the manifests, because a listing may be late; shards are listed."""
    held, listed = target.folder.files(), source.folder.files("pairs")
    shards: dict[str, int] = {}
    for reference_id in report.scored_references:
        shards |= shard_files(source.folder, reference_id)
    part_names = chain.from_iterable(map(part_files, manifests.values()))
    parts = {name: listed[name] if name in listed else source.folder.size(name) for name in part_names}
    documents = [f"references/{entry}/reference.json" for entry in report.references]
    sealed = {f"pairs/{name}/manifest.json": seal_document(manifests[name]) for name in manifests}
    replaced = {f"pairs/{name}/manifest.json" for name in changed}
    sent_manifests = {
        name: content
        for name, content in sealed.items()
        if name in replaced or not target.folder.exists(name)
    }
    groups = [
        _missing_documents(source, target, ["format.json"]),
        _missing_documents(source, target, documents),
        {name: size for name, size in shards.items() if held.get(name) != size},
        {name: size for name, size in parts.items() if held.get(name) != size},
        {name: len(content) for name, content in sent_manifests.items()},
    ]
    sent = {name for group in groups for name in group}
    present = {name: size for name, size in (shards | parts).items() if name not in sent}
    present |= {name: held.get(name, 0) for name in ("format.json", *documents, *sealed) if name not in sent}
    return _Plan(groups, present, sent_manifests)


def _missing_documents(source: Cache, target: Cache, names: Sequence[str]) -> dict[str, int]:
    return {name: source.folder.size(name) for name in names if not target.folder.exists(name)}


class _Sender:
    """Sends the groups of a plan, several files at once, and counts."""

    def __init__(
        self, source: Cache, target: Cache, report: TransferReport, on_progress: OnProgress, started: float
    ):
        self._source, self._target, self._report = source, target, report
        self._on_progress, self._started = on_progress, started
        self._large = threading.Lock()
        self._manifests: dict[str, bytes] = {}

    def send(self, plan: _Plan) -> None:
        report, self._manifests = self._report, plan.manifests
        total_files = report.files_sent + sum(len(group) for group in plan.groups)
        total_bytes = report.bytes_sent + sum(sum(group.values()) for group in plan.groups)
        report.files_present = len(plan.present) - report.files_sent  # minus those of earlier plans
        report.bytes_present = sum(plan.present.values()) - report.bytes_sent
        for num_bytes in chain.from_iterable(map(self._send_group, plan.groups)):
            report.files_sent += 1
            report.bytes_sent += num_bytes
            elapsed_s = time.monotonic() - self._started
            self._on_progress(
                TransferProgress(report.files_sent, total_files, report.bytes_sent, total_bytes, elapsed_s)
            )

    def _send_group(self, group: dict[str, int]) -> Iterator[int]:
        """Yield the sizes of the files as they arrive. An error is raised after the files that were being
        sent.
        """
        with ThreadPoolExecutor(THREADS, thread_name_prefix="transfer") as pool:
            waiting: set[Future[int]] = {
                pool.submit(self._send_file, name, size) for name, size in group.items()
            }
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _send_file(self, name: str, size: int) -> int:
        with self._large if size > LARGE_BYTES else nullcontext():
            # a manifest that was replaced meanwhile names parts that were not sent
            content = self._manifests.get(name) or self._source.folder.read(name)
            if name.endswith(".parquet"):
                check_content(content, name, f"{self._source}/{name}")
            self._target.folder.publish(name, content)
            return len(content)
