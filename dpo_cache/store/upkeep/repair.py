"""Move the bad files that `verify` found to `CACHE/.quarantine/<first of its sha256>/<its name>`.

No content is lost. A file is moved only if its bytes are still those that `verify` found bad: others may have
published it again. What could not be read is left where it is. Completions of a damaged shard that a pair set
also holds are published again from there, and need not be scored again.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CacheError, CorruptShardError, MissingFileError, StorageError, first_line
from dpo_cache.store.cache import FORMAT, read_reference
from dpo_cache.store.folders.folder import Folder, open_folder
from dpo_cache.store.format.checks import most_bytes_of
from dpo_cache.store.format.documents import Document, digest_bytes, render_document
from dpo_cache.store.format.keys import completion_key
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.format.parquet import ParquetReader, name_by_content
from dpo_cache.store.format.shards import SHARD_SCHEMA, encode_shard, read_keys
from dpo_cache.store.key_table import KeyTable
from dpo_cache.store.pairs import PairSet
from dpo_cache.store.upkeep.commands import precompute_line
from dpo_cache.store.upkeep.contents import classify, shard_files
from dpo_cache.store.upkeep.problems import VerifyReport
from dpo_cache.store.upkeep.removal import put_back_needed
from dpo_cache.store.upkeep.remove import remove_later_scores
from dpo_cache.types import Score

QUARANTINE = ".quarantine"
REWRITTEN = ("damaged", "missing")  # kinds of problems for which format.json is written again


@dataclass(frozen=True)
class Moved:
    """A file that was moved aside."""

    file: str
    to: str | None  # None: a link, which was removed; the file that it points to is kept
    completions: int | None = None  # None if its footer is unreadable or it is no shard


@dataclass(frozen=True)
class Left:
    """A bad file that was not moved, and why."""

    file: str
    why: str


@dataclass
class RepairReport:
    """The moved files, and the commands that score lost completions again."""

    moved: list[Moved] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    restored: int = 0  # completions of damaged shards that a pair set also held
    commands: list[str] = field(default_factory=list)

    def add(self, outcome: Moved | Left) -> None:
        """Note what became of a file."""
        if isinstance(outcome, Moved):
            self.moved.append(outcome)
        else:
            self.left.append(outcome)

    @property
    def lost(self) -> int | None:
        """Completions to be scored again, at most; None where a damaged shard's number is unknown."""
        shards = [moved.completions for moved in self.moved if classify(moved.file)[0] == "shard"]
        known = [number for number in shards if number is not None]
        return max(0, sum(known) - self.restored) if len(known) == len(shards) else None


def repair_cache(location: str | os.PathLike[str], verified: VerifyReport) -> RepairReport:
    """Move every file aside that `verify_cache` found bad, and restore scores that pair sets hold.

    Of two files that differ either may be wrong, so both are moved. Files that cannot be read any more, have
    other bytes by now, or belong to another user who does not let this one move them, are left and listed.
    Raises `CacheError` where the folder cannot be written.
    """
    folder, report = open_folder(location), RepairReport()
    put_back_needed(folder, folder.hidden())
    shards = _damaged_shards(verified)
    # first: once they are moved, a repair after an interruption would not know what they held
    report.restored = _restore_scores(folder, [file for file in shards if shards[file]], shards)
    for problem in verified.problems:
        if problem.kind == "link":
            report.add(_unless_refused(problem.file, partial(_remove_link, folder, problem.file)))
    for file, sha256 in sorted(_bad_files(verified).items()):
        report.add(_unless_refused(file, partial(_move, folder, file, sha256)))
    if any(problem.file == "format.json" and problem.kind in REWRITTEN for problem in verified.problems):
        folder.publish("format.json", render_document(FORMAT))
    moved = {moved.file for moved in report.moved}
    report.restored += _restore_scores(
        folder, [file for file in shards if not shards[file] and file in moved], {}
    )
    report.commands = _commands(folder, verified, report)
    return report


def _unless_refused(file: str, act: Callable[[], Moved | Left]) -> Moved | Left:
    """The outcome for the file; it stays in its place if a disk or store refuses this user."""
    try:
        return act()
    except StorageError as error:
        if not _is_of_the_file(error):
            raise
        return Left(file, first_line(error))


def _remove_link(folder: Folder, file: str) -> Moved:
    folder.remove(file)
    return Moved(file, None)


def _bad_files(verified: VerifyReport) -> dict[str, str | None]:
    """The files to move, with the digests of their bad bytes; None for one that was not read whole."""
    bad: dict[str, str | None] = {}
    for problem in verified.problems:
        if problem.kind in ("damaged", "differs"):
            bad[problem.file] = problem.sha256
        if problem.kind == "differs" and problem.other:  # a shard or part, whose bytes hash to its name
            bad.setdefault(problem.other, problem.other.rpartition("/")[2].partition(".")[0])
    return bad


def _move(folder: Folder, file: str, sha256: str | None) -> Moved | Left:
    """Give the file a name in the quarantine, if it has the bytes that were found bad."""
    if sha256 is None:
        return _move_unread(folder, file)
    changed = Left(file, "its bytes have changed since: verify again")
    to = _quarantined(file, sha256)
    if digest_bytes(folder.read(file)) == sha256:
        if not folder.move(file, to):
            return changed
    elif not folder.exists(to):  # else it was kept aside when its scores were put back
        return changed
    content = folder.read(to)
    if digest_bytes(content) != sha256:  # a writer has just published the file again
        if not folder.exists(file):
            folder.move(to, file)
        return changed
    num_rows = None
    if classify(file)[0] == "shard":
        with suppress(CacheError):
            num_rows = ParquetReader(pa.BufferReader(content), SHARD_SCHEMA, file).footer.num_rows
    return Moved(file, to, num_rows)


def _move_unread(folder: Folder, file: str) -> Moved | Left:
    """The same for a file that is larger than any of a cache; a pipe or a device holds nothing, and is
    removed.
    """
    try:
        num_bytes = folder.size(file)
    except MissingFileError as error:
        return Left(file, first_line(error))
    except CorruptShardError:
        folder.remove(file)
        return Moved(file, None)
    if num_bytes <= most_bytes_of(file):
        return Left(file, "its bytes have changed since: verify again")
    to = f"{QUARANTINE}/{num_bytes}-bytes/{file}"
    folder.move(file, to)
    return Moved(file, to)


def _is_of_the_file(error: StorageError) -> bool:
    """Return whether a disk or store refused this file to this user, or failed to read it."""
    return error.is_denied or str(error).startswith("cannot read ")


def _quarantined(file: str, sha256: str) -> str:
    """The name of a bad file that is moved aside, by the digest of its bytes."""
    return f"{QUARANTINE}/{sha256[:16]}/{file}"


def _damaged_shards(verified: VerifyReport) -> dict[str, str | None]:
    """The damaged shards, with the digests of their bytes; None for one that was not read whole. Of shards
    that differ nothing is restored.
    """
    damaged = {problem.file: problem.sha256 for problem in verified.problems if problem.kind == "damaged"}
    return {file: sha256 for file, sha256 in damaged.items() if classify(file)[0] == "shard"}


def _restore_scores(folder: Folder, files: Sequence[str], damaged: dict[str, str | None]) -> int:
    """Publish the scores that pair sets hold and whole shards lack, of the references of these files.

    Returns their number. `damaged` are bad shards that are not moved yet.
    """
    restored = 0
    for reference_id in sorted({classify(file)[1][0] for file in files}):
        had_entry = folder.exists(f"references/{reference_id}/reference.json")
        known = _keys_of_whole_shards(folder, reference_id, damaged)
        for pairs in _pair_sets_of(folder, reference_id):
            if pairs.is_imported:  # imports have no shards
                continue
            with suppress(CacheError):  # a damaged pair set: its completions are scored again
                for block in range(len(pairs.block_sizes)):
                    published = _publish_missing(folder, known, pairs, block, damaged)
                    known.add(published, 0)
                    restored += len(published)
        if had_entry:
            remove_later_scores(folder, reference_id)
    return restored


def _keys_of_whole_shards(folder: Folder, reference_id: str, damaged: dict[str, str | None]) -> KeyTable:
    """Keys in the reference's shards without the damaged ones and those that cannot be read; no rows."""
    known = KeyTable()
    for shard in sorted(shard_files(folder, reference_id).keys() - {*damaged}):
        with suppress(CacheError):
            for keys in read_keys(folder, shard):
                known.add(keys, 0)
    return known


def _publish_missing(
    folder: Folder, known: KeyTable, pairs: PairSet, block: int, damaged: dict[str, str | None]
) -> np.ndarray:
    """Publish the block's scores whose keys are not known, as a shard. Returns their keys, S16.

    The same scores make the same shard: if it takes the place of the damaged one, that is kept aside before;
    if that was not read whole, nothing is published before it is moved.
    """
    scores: dict[bytes, Score] = {}
    for scored in pairs.read_block(block):
        scores[completion_key(scored.pair.chosen)] = scored.ref_chosen
        scores[completion_key(scored.pair.rejected)] = scored.ref_rejected
    keys = np.array(list(scores), "S16")
    is_known = known.find(keys) >= 0
    missing = [entry for entry, there in zip(scores.items(), is_known, strict=True) if not there]
    if missing:
        content = encode_shard(missing)
        file = f"references/{pairs.reference_id}/scores/{name_by_content(content)}"
        if file in damaged and damaged[file] is None:
            return keys[:0]
        if file in damaged:
            bad = folder.read(file)
            folder.publish(_quarantined(file, digest_bytes(bad)), bad)
        folder.publish(file, content)
    return keys[~is_known]


def _pair_sets_of(folder: Folder, reference_id: str) -> list[PairSet]:
    found = []
    for file in folder.files("pairs"):
        kind, parts = classify(file)
        if kind == "manifest":
            with suppress(CacheError):
                found.append(PairSet(folder, f"pairs/{parts[0]}", read_manifest(folder, f"pairs/{parts[0]}")))
    return [pairs for pairs in found if pairs.reference_id == reference_id]


def _commands(folder: Folder, verified: VerifyReport, report: RepairReport) -> list[str]:
    """The commands that make again what was moved or is missing: one for each pair set that needs it, with
    the options that its manifest and reference still hold.
    """
    files = [moved.file for moved in report.moved]
    missing = [problem.file for problem in verified.problems if problem.kind == "missing"]
    files += [file for file in missing if not folder.exists(file)]
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
