"""What `verify` found, moved aside: `CACHE/.quarantine/<first of its sha256>/<its name>`. No content is lost.

Completions of a damaged shard that a pair set holds, too, are scored no second time: they are put back from
there.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass, field

import pyarrow as pa

from dpo_cache.errors import CacheError
from dpo_cache.store.cache import FORMAT, read_reference
from dpo_cache.store.folders.folder import Folder, open_folder
from dpo_cache.store.format.documents import Document, render_document
from dpo_cache.store.format.keys import completion_key
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.index import ScoreIndex
from dpo_cache.store.pairs import PairSet
from dpo_cache.store.upkeep.commands import precompute_line
from dpo_cache.store.upkeep.contents import classify, count_footer
from dpo_cache.store.upkeep.verify import VerifyReport
from dpo_cache.types import Score

QUARANTINE = ".quarantine"


@dataclass(frozen=True)
class Moved:
    """A file that was moved aside; `completions` that it held, None where its footer is not readable or it is
    no shard.
    """

    file: str
    to: str | None  # None: a link, of which nothing is kept but what it points to
    completions: int | None = None


@dataclass
class RepairReport:
    """What was done, and the commands that score again what was lost."""

    moved: list[Moved] = field(default_factory=list)
    restored: int = 0  # completions of damaged shards that a pair set held, too
    commands: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int | None:
        """Completions to be scored again, at most; None where a damaged shard does not say how many it
        held.
        """
        shards = [moved.completions for moved in self.moved if classify(moved.file)[0] == "shard"]
        known = [number for number in shards if number is not None]
        return max(0, sum(known) - self.restored) if len(known) == len(shards) else None


def repair_cache(location: str | os.PathLike[str], verified: VerifyReport) -> RepairReport:
    """Move every file aside that `verify_cache` found bad, and put back what pair sets can give.

    Of two files that differ either may be wrong, so both are moved. Raises `CacheError` where the folder
    cannot be written.
    """
    folder, report = open_folder(location), RepairReport()
    affected = _affected(verified)
    for problem in verified.problems:
        if problem.kind == "link":
            folder.remove(problem.file)
            report.moved.append(Moved(problem.file, None))
    for file in _files_to_move(verified):
        report.moved.append(_move(folder, file))
    if any(problem.file == "format.json" for problem in verified.problems):
        folder.publish("format.json", render_document(FORMAT))
    for reference_id in sorted(
        {
            classify(p.file)[1][0]
            for p in verified.problems
            if p.kind == "damaged" and classify(p.file)[0] == "shard"
        }
    ):
        report.restored += _restore(folder, reference_id)
    report.commands = _commands(folder, affected)
    return report


def _files_to_move(verified: VerifyReport) -> list[str]:
    bad = {problem.file for problem in verified.problems if problem.kind in ("damaged", "differs")}
    return sorted(
        bad | {problem.other for problem in verified.problems if problem.kind == "differs" and problem.other}
    )


def _move(folder: Folder, file: str) -> Moved:
    """Keep the content under another name, then remove the file."""
    content = folder.read(file)
    to = f"{QUARANTINE}/{hashlib.sha256(content).hexdigest()[:16]}/{file}"
    folder.publish(to, content)
    folder.remove(file)
    return Moved(file, to, _rows_in(content) if classify(file)[0] == "shard" else None)


def _rows_in(content: bytes) -> int | None:
    try:
        return count_footer(pa.BufferReader(content), "")[0]
    except CacheError:
        return None


def _restore(folder: Folder, reference_id: str) -> int:
    """Publish the scores that pair sets of this reference hold and its shards lack. Returns how many."""
    restored = 0
    try:
        index = ScoreIndex(folder, f"references/{reference_id}/scores")
    except CacheError:  # another shard cannot be read, nor be moved: then nothing is put back
        return 0
    for pairs in _pair_sets_of(folder, reference_id):
        if pairs.is_imported:  # such values are in pair sets alone
            continue
        try:
            for block in range(len(pairs.block_sizes)):
                restored += _publish_missing(index, pairs, block)
        except CacheError:  # damaged itself: what it would have given is scored again
            continue
    return restored


def _publish_missing(index: ScoreIndex, pairs: PairSet, block: int) -> int:
    scores: dict[bytes, Score] = {}
    for scored in pairs.read_block(block):
        scores[completion_key(scored.pair.chosen)] = scored.ref_chosen
        scores[completion_key(scored.pair.rejected)] = scored.ref_rejected
    keys = list(scores)
    missing = [(key, scores[key]) for key, there in zip(keys, index.contains(keys), strict=True) if not there]
    if missing:
        index.publish(missing)
    return len(missing)


def _pair_sets_of(folder: Folder, reference_id: str) -> list[PairSet]:
    found = []
    for file in folder.files("pairs"):
        kind, parts = classify(file)
        if kind != "manifest":
            continue
        try:
            manifest = read_manifest(folder, f"pairs/{parts[0]}")
        except CacheError:
            continue
        if manifest["reference"] == reference_id:
            found.append(PairSet(folder, f"pairs/{parts[0]}", manifest))
    return found


def _affected(verified: VerifyReport) -> tuple[set[str], set[str]]:
    """References that lost something, and pair sets that did."""
    references, pair_sets = set(), set()
    for problem in verified.problems:
        for file in filter(None, (problem.file, problem.other)):
            kind, parts = classify(file)
            if kind in ("reference", "shard"):
                references.add(parts[0])
            elif kind in ("manifest", "part"):
                pair_sets.add(parts[0])
    return references, pair_sets


def _commands(folder: Folder, affected: tuple[set[str], set[str]]) -> list[str]:
    """What scores the lost completions again: one command a pair set that needs them, as far as what is left
    tells.
    """
    references, pair_sets = affected
    commands = []
    for reference_id in sorted(references):
        pair_sets = pair_sets | {pairs.name for pairs in _pair_sets_of(folder, reference_id)}
    for name in sorted(pair_sets):
        try:
            manifest = read_manifest(folder, f"pairs/{name}")
        except CacheError:  # moved aside, or gone
            manifest = {"name": name.partition("/")[0], "split": name.partition("/")[2]}
        commands.append(precompute_line(str(folder), manifest, _reference_of(folder, manifest)))
    if references and not commands:
        commands.append(
            shlex.join(
                ["dpo-cache", "precompute", "--cache", str(folder), "--model", "MODEL", "--dataset", "DATA"]
            )
        )
    return commands


def _reference_of(folder: Folder, manifest: Document) -> Document | None:
    try:
        return read_reference(folder, manifest["reference"]) if "reference" in manifest else None
    except CacheError:
        return None
