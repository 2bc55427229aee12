"""Move the bad files that `verify` found to `CACHE/.quarantine/<first of its sha256>/<its name>`.

No content is lost. Completions of a damaged shard that a pair set also holds are published again from there,
and need not be scored again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass, field

import pyarrow as pa

from dpo_cache.errors import CacheError
from dpo_cache.store.cache import FORMAT, read_reference
from dpo_cache.store.folders.folder import Folder, open_folder
from dpo_cache.store.format.documents import Document, render_document
from dpo_cache.store.format.keys import completion_key
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.format.parquet import ParquetReader
from dpo_cache.store.format.shards import SHARD_SCHEMA
from dpo_cache.store.index import ScoreIndex
from dpo_cache.store.pairs import PairSet
from dpo_cache.store.upkeep.commands import precompute_line
from dpo_cache.store.upkeep.contents import classify
from dpo_cache.store.upkeep.verify import VerifyReport
from dpo_cache.types import Score

QUARANTINE = ".quarantine"


@dataclass(frozen=True)
class Moved:
    """A file that was moved aside."""

    file: str
    to: str | None  # None: a link, which was removed; the file that it points to is kept
    completions: int | None = None  # that it held; None where its footer is not readable or it is no shard


@dataclass
class RepairReport:
    """The moved files, and the commands that score lost completions again."""

    moved: list[Moved] = field(default_factory=list)
    restored: int = 0  # completions of damaged shards that a pair set also held
    commands: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int | None:
        """Completions to be scored again, at most; None where a damaged shard's number is unknown."""
        shards = [moved.completions for moved in self.moved if classify(moved.file)[0] == "shard"]
        known = [number for number in shards if number is not None]
        return max(0, sum(known) - self.restored) if len(known) == len(shards) else None


def repair_cache(location: str | os.PathLike[str], verified: VerifyReport) -> RepairReport:
    """Move every file aside that `verify_cache` found bad, and restore scores that pair sets hold.

    Of two files that differ either may be wrong, so both are moved. Raises `CacheError` where the folder
    cannot be written.
    """
    folder, report = open_folder(location), RepairReport()
    bad, damaged_references = set(), set()
    for problem in verified.problems:
        kind, parts = classify(problem.file)
        if problem.kind == "link":
            folder.remove(problem.file)
            report.moved.append(Moved(problem.file, None))
        elif problem.kind == "differs":
            bad |= {problem.file, problem.other or problem.file}
        elif problem.kind == "damaged":
            bad.add(problem.file)
            damaged_references |= {parts[0]} if kind == "shard" else set()
    report.moved += [_move(folder, file) for file in sorted(bad)]
    if any(problem.file == "format.json" for problem in verified.problems):
        folder.publish("format.json", render_document(FORMAT))
    report.restored = sum(_restore(folder, reference_id) for reference_id in sorted(damaged_references))
    report.commands = _commands(folder, verified)
    return report


def _move(folder: Folder, file: str) -> Moved:
    """Publish the content under another name, then remove the file."""
    content = folder.read(file)
    to = f"{QUARANTINE}/{hashlib.sha256(content).hexdigest()[:16]}/{file}"
    folder.publish(to, content)
    folder.remove(file)
    num_rows = None
    if classify(file)[0] == "shard":
        with suppress(CacheError):
            num_rows = ParquetReader(pa.BufferReader(content), SHARD_SCHEMA, file).footer.num_rows
    return Moved(file, to, num_rows)


def _restore(folder: Folder, reference_id: str) -> int:
    """Publish the scores that pair sets of this reference hold and its shards lack. Returns their number."""
    restored = 0
    try:
        index = ScoreIndex(folder, f"references/{reference_id}/scores")
    except CacheError:  # another shard can neither be read nor moved: nothing is restored
        return 0
    for pairs in _pair_sets_of(folder, reference_id):
        with suppress(CacheError):  # a damaged pair set: its completions are scored again
            for block in range(0 if pairs.is_imported else len(pairs.block_sizes)):  # imports have no shards
                restored += _publish_missing(index, pairs, block)
    return restored


def _publish_missing(index: ScoreIndex, pairs: PairSet, block: int) -> int:
    scores: dict[bytes, Score] = {}
    for scored in pairs.read_block(block):
        scores[completion_key(scored.pair.chosen)] = scored.ref_chosen
        scores[completion_key(scored.pair.rejected)] = scored.ref_rejected
    is_there = index.contains(list(scores))
    missing = [entry for entry, there in zip(scores.items(), is_there, strict=True) if not there]
    if missing:
        index.publish(missing)
    return len(missing)


def _pair_sets_of(folder: Folder, reference_id: str) -> list[PairSet]:
    found = []
    for file in folder.files("pairs"):
        kind, parts = classify(file)
        if kind == "manifest":
            with suppress(CacheError):
                found.append(PairSet(folder, f"pairs/{parts[0]}", read_manifest(folder, f"pairs/{parts[0]}")))
    return [pairs for pairs in found if pairs.reference_id == reference_id]


def _commands(folder: Folder, verified: VerifyReport) -> list[str]:
    """The commands that score lost completions again: one for each pair set that needs them, with the options
    that its manifest and reference still hold.
    """
    files = [file for problem in verified.problems for file in (problem.file, problem.other) if file]
    affected = [classify(file) for file in files]
    references = {parts[0] for kind, parts in affected if kind in ("reference", "shard")}
    pair_sets = {parts[0] for kind, parts in affected if kind in ("manifest", "part")}
    for reference_id in references:
        pair_sets |= {pairs.name for pairs in _pair_sets_of(folder, reference_id)}
    if references and not pair_sets:
        words = ["dpo-cache", "precompute", "--cache", str(folder), "--model", "MODEL", "--dataset", "DATA"]
        return [shlex.join(words)]
    return [_command(folder, name) for name in sorted(pair_sets)]


def _command(folder: Folder, pair_set: str) -> str:
    name, split = pair_set.split("/")
    manifest: Document = {"name": name, "split": split}
    reference = None
    with suppress(CacheError):  # either may be moved aside, or gone
        manifest = read_manifest(folder, f"pairs/{pair_set}")
        reference = read_reference(folder, manifest["reference"])
    return precompute_line(str(folder), manifest, reference)
