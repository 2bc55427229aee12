"""Check that every byte of a cache is as it was written, and that its files agree with each other.

    report = verify_cache("cache")
    report.problems                      # each names its file, what was expected and found, and what to do

`repair.py` moves bad files aside.

Every file is read for its own digest, schema and values, one in memory at a time; then shards and pair sets
are read again and compared, once for each range of keys (see `compare.py`). A file is damaged only if it was
read, twice, and is not what was published. What the disk or the store does not let us read is unreadable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dpo_cache.errors import CacheError, CorruptShardError, MissingFileError, StorageError, first_line
from dpo_cache.store.cache import FORMAT, read_reference
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.checks import (
    WholeShard,
    check_details,
    check_part,
    check_shard,
    most_bytes_of,
)
from dpo_cache.store.format.documents import Document, digest_bytes, render_document
from dpo_cache.store.format.pair_tables import PairsDigest, part_files, read_manifest
from dpo_cache.store.upkeep.compare import allowed_gap, compare_files
from dpo_cache.store.upkeep.contents import classify, open_for_upkeep
from dpo_cache.store.upkeep.open_runs import read_record, run_records
from dpo_cache.store.upkeep.problems import Problem, VerifyReport
from dpo_cache.store.upkeep.subset import Subset, choose_subset, record_subset

OnProgress = Callable[[int, int], None]  # bytes read, of how many
Result = TypeVar("Result")

SCORE_AGAIN = "Run the `dpo-cache precompute` that made it: it scores only what is missing."
AGAIN = (
    "Run with `repair` to move it aside, then the `dpo-cache precompute` that made it: it scores only "
    "what is missing."
)
READ_AGAIN = (
    "Run the same command again. If that does not help, check the disk and the memory of this machine."
)


def verify_cache(
    location: str | os.PathLike[str],
    *,
    subset: float | None = None,
    on_progress: OnProgress | None = None,
) -> VerifyReport:
    """Check every byte of the cache at a path or URL. Raises `FormatError` where there is none, or a newer
    one.

    With `subset`, a share from 0 to 1, only so many of the shards and parts are read, others each time (see
    `subset.py`); of all others the sizes are checked. Files that other processes publish meanwhile are not
    checked, and files that they remove are no problem.
    """
    folder, _ = open_for_upkeep(location)
    chosen = None if subset is None else choose_subset(folder, subset)
    report = _Verification(folder, on_progress or (lambda *_: None), chosen).run()
    if chosen:
        report.subset = subset
        record_subset(folder, chosen)
    return report


@dataclass
class _Scored:
    """The undamaged files of one reference: its identity, and the files that hold its log-probs."""

    identity: Document = field(default_factory=dict)
    shards: list[WholeShard] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)


class _Verification:
    """One pass over a cache."""

    def __init__(self, folder: Folder, on_progress: OnProgress, subset: Subset | None):
        self.folder, self.on_progress, self.subset = folder, on_progress, subset
        self.report = VerifyReport(str(folder))
        self.links = {*folder.links()}
        beyond = tuple(f"{link}/" for link in self.links)
        self.files = {
            name: size
            for name, size in folder.files().items()
            if name not in self.links and not name.startswith(beyond)
        }
        self.kinds = {name: classify(name) for name in self.files}
        self.owned: dict[tuple[str, str], list[str]] = {}  # by kind, and reference or pair set
        for name, (kind, parts) in self.kinds.items():
            self.owned.setdefault((kind, parts[0] if parts else ""), []).append(name)
        self.total = sum(size for name, size in self.files.items() if self._is_read_now(name))
        self.digests: dict[str, str] = {}  # hashes of the bytes that were read last
        self.references: dict[str, _Scored] = {}

    def run(self) -> VerifyReport:
        self.report.files, self.report.bytes = len(self.files), sum(self.files.values())
        for name in self.links:
            remedy = "Copy what it points to into the cache, or remove it."
            self._note(name, "link", "only files, none of them a link", "a symbolic link", remedy)
        for name in self.folder.closed_folders():
            self._note_unreadable(name, "permission denied", "Ask its owner to let you list it.")
        self._check_format()
        for reference_id in self._names_of("reference", "shard"):
            self._check_reference(reference_id)
        for name in self._names_of("manifest", "part"):
            self._check_pair_set(name)
        for reference_id, scored in self.references.items():
            self._compare(reference_id, scored)
        self.report.unknown = self.owned.get(("unknown", ""), [])
        self.report.problems = sorted(
            set(self.report.problems), key=lambda problem: (problem.file, problem.kind, problem.expected)
        )
        return self.report

    def _names_of(self, *kinds: str) -> list[str]:
        """References, or pair sets, that have a file of one of these kinds."""
        return sorted({name for kind, name in self.owned if kind in kinds})

    def _is_read_now(self, file: str) -> bool:
        """Return whether this run reads the file: of shards and parts only those of the subset."""
        kind = self.kinds[file][0]
        is_left = kind in ("shard", "part") and self.subset is not None and file not in self.subset
        return kind != "unknown" and not is_left

    # -- format.json, references -----------------------------------------------------------------------

    def _check_format(self) -> None:
        remedy = "Run with `repair` to write it again."
        if "format.json" not in self.files:
            self._note("format.json", "missing", str(FORMAT), "no such file", remedy)
            return
        content = self._try("format.json", lambda content: content)
        if content is not None and content != render_document(FORMAT):
            found = content[:80].decode(errors="backslashreplace").replace("\n", " ").strip()
            self._note("format.json", "damaged", str(FORMAT), found or "an empty file", remedy)

    def _check_reference(self, reference_id: str) -> None:
        self.report.references += 1
        name = f"references/{reference_id}/reference.json"
        scored = self.references[reference_id] = _Scored()
        shards = self.owned.get(("shard", reference_id), [])
        if self._exists(name):
            entry = self._try(name, lambda _: read_reference(self.folder, reference_id)) or {}
            scored.identity = entry.get("identity", {})
        else:  # a removal or `compact` was killed; where a pair set needs the entry, it is noted there
            self.report.unreferenced += filter(self._exists, shards)
        for record in run_records(self.folder, f"references/{reference_id}"):
            self._try(record, lambda _, record=record: read_record(self.folder, record))  # type: ignore[misc]
        for file in filter(self._is_read_now, shards):
            scored.shards += filter(None, [self._try(file, partial(check_shard, file))])
        self.report.completions += sum(shard.num_rows for shard in scored.shards)

    # -- pair sets -------------------------------------------------------------------------------------

    def _check_pair_set(self, name: str) -> None:
        """Check the manifest, every part that it names, and that the parts have its pairs."""
        place, file = f"pairs/{name}", f"pairs/{name}/manifest.json"
        present = {*self.owned.get(("part", name), [])}
        if file not in self.files:
            self.report.unreferenced += sorted(present)
            return
        manifest = self._try(
            file, lambda _: check_details(read_manifest(self.folder, place), f"{self.folder}/{file}")
        )
        if manifest is None:  # its parts are unknown
            return
        self.report.pair_sets += 1
        named = part_files(manifest)
        self.report.unreferenced += sorted(present - named.keys())
        digest, num_problems = PairsDigest(), len(self.report.problems)
        whole = [self._check_part(part, promised, manifest, digest) for part, promised in named.items()]
        if all(whole) and len(self.report.problems) == num_problems:
            self._check_manifest_values(file, manifest, digest.hexdigest())

    def _check_part(self, file: str, part: Document, manifest: Document, digest: PairsDigest) -> bool:
        """Check a part that the manifest names. Returns whether it was read and is whole."""
        is_listed = self.files.get(file) == part["bytes"]
        if file in self.links or (is_listed and not self._is_read_now(file)):
            return False
        has_token_logps = manifest.get("token_logps", True)
        check = partial(check_part, promised=part, digest=digest, has_token_logps=has_token_logps)
        if self._try(file, lambda content: check(file, content)) is None:
            if not self._exists(file) and self._is_named(file):
                expected = f"{part['rows']} pairs, {part['bytes']} bytes, as the manifest says"
                self._note(file, "missing", expected, "no such file", SCORE_AGAIN)
            return False
        if has_token_logps:  # imported sums have no values to compare
            self.references.setdefault(manifest["reference"], _Scored()).parts.append(file)
        self.report.pairs += part["rows"]
        return True

    def _is_named(self, part: str) -> bool:
        """Return whether the manifest of the part's pair set names it now: it may have been replaced
        meanwhile.
        """
        try:
            return part in part_files(read_manifest(self.folder, part.rpartition("/")[0]))
        except CacheError:
            return False

    def _check_manifest_values(self, file: str, manifest: Document, digest: str) -> None:
        if digest != manifest["pairs_digest"]:
            expected = f"pairs whose digest is {manifest['pairs_digest'][:12]}…"
            found = f"parts whose pairs have the digest {digest[:12]}…"
            self._note(file, "damaged", expected, found, AGAIN)
        reference = f"references/{manifest['reference']}/reference.json"
        if not self._exists(reference):
            self._note(reference, "missing", f"the reference that {file} names", "no such file", SCORE_AGAIN)

    # -- files compared with each other ----------------------------------------------------------------

    def _compare(self, reference_id: str, scored: _Scored) -> None:
        """Compare the values that shards and pair sets hold of one completion, with the dtype's tolerance."""
        allowed = allowed_gap(scored.identity)
        shards, parts = [shard.file for shard in scored.shards], scored.parts
        try:
            found_apart = compare_files(self.folder, shards, parts, allowed)
        except CacheError as error:
            left = [[file for file in files if self._exists(file)] for files in (shards, parts)]
            if left == [shards, parts]:
                # each file was whole when it was read the first time
                place = f"references/{reference_id}"
                self._note_unreadable(place, f"its values were not compared: {first_line(error)}", READ_AGAIN)
                return
            # others were compacted meanwhile
            found_apart = compare_files(self.folder, left[0], left[1], allowed)
        for apart in found_apart:
            file = apart.file
            if classify(file)[0] == "part":
                file = f"{file.rpartition('/')[0]}/manifest.json"
            expected = f"the log-probs that {apart.other} has, within {allowed:g} nats a token"
            gap = f"a gap of up to {apart.largest_gap:.2g} nats"
            if apart.largest_gap == float("inf"):
                gap = "another number of tokens"
            found = f"{gap} in {apart.num_completions} of them"
            remedy = "Either may be wrong: `rescore` with `model` finds out which; `repair` moves both aside."
            self._note(file, "differs", expected, found, remedy, apart.other)

    # -- reading ---------------------------------------------------------------------------------------

    def _try(self, file: str, check: Callable[[bytes], Result]) -> Result | None:
        """The result of a check of the file's bytes; None, with the problem noted, where it raises
        `CacheError`, and where the file was collected or compacted since it was listed.

        A check that fails is repeated on bytes that are read again: a fault in reading is no damage.
        """
        self._count(file)
        failed: list[tuple[CacheError, str | None]] = []
        for _ in range(2):
            try:
                result = check(self._read(file))
            except MissingFileError:
                return None
            except StorageError as error:
                found, _, remedy = str(error).partition("\n")
                self._note_unreadable(file, found, remedy)
                return None
            except CacheError as error:
                failed.append((error, self.digests.get(file)))
            else:
                break
        if not failed:
            return result
        found = first_line(failed[0][0]).removeprefix(f"{self.folder}/{file}: ").removeprefix(f"{file}: ")
        if len(failed) == 1 or failed[0][1] != failed[1][1]:
            self._note_unreadable(file, f"other bytes each time it is read ({found.rstrip('.')})", READ_AGAIN)
        elif self._exists(file):
            self._note(file, "damaged", "the bytes that were published", found, AGAIN)
        return None

    def _read(self, file: str) -> bytes:
        self.digests.pop(file, None)
        num_bytes = self.files[file] if file in self.files else self.folder.size(file)
        most_bytes = most_bytes_of(file)
        if num_bytes > most_bytes:
            raise CorruptShardError(f"{file}: {num_bytes} bytes long, expected at most {most_bytes}.")
        content = self.folder.read(file)
        self.digests[file] = digest_bytes(content)
        return content

    def _exists(self, file: str) -> bool:
        """Return whether the file is there, or may be there: a folder that gives no answer is noted."""
        try:
            return self.folder.exists(file)
        except StorageError as error:
            found, _, remedy = str(error).partition("\n")
            self._note_unreadable(file, found, remedy)
            return True

    def _count(self, file: str) -> None:
        self.report.files_read += 1
        self.report.bytes_read += self.files.get(file, 0)
        self.on_progress(self.report.bytes_read, max(self.total, self.report.bytes_read))

    def _note_unreadable(self, file: str, found: str, remedy: str) -> None:
        self._note(file, "unreadable", "a file or folder that can be read", found, remedy)

    def _note(
        self, file: str, kind: str, expected: str, found: str, remedy: str, other: str | None = None
    ) -> None:
        sha256 = self.digests.get(file) if kind in ("damaged", "differs") else None
        self.report.problems.append(Problem(file, kind, expected, found.rstrip("."), remedy, other, sha256))
