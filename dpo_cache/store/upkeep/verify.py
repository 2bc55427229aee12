"""Check that every byte of a cache is as it was written, and that its files agree with each other.

    report = verify_cache("cache")
    report.problems                      # each names its file, what was expected and found, and what to do

`repair.py` moves bad files aside.

Every file is read for its own digest, schema and values, one in memory at a time; then shards and pair sets
are read again and compared, once for each range of keys (see `compare.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from dpo_cache.errors import CacheError, first_line
from dpo_cache.store.cache import FORMAT, read_reference
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.checks import WholeShard, check_details, check_part, check_shard
from dpo_cache.store.format.documents import Document, render_document
from dpo_cache.store.format.pair_tables import PairsDigest, part_files, read_manifest
from dpo_cache.store.upkeep.compare import allowed_gap, compare_files
from dpo_cache.store.upkeep.contents import classify, open_for_upkeep

OnProgress = Callable[[int, int], None]  # bytes read, of how many
Result = TypeVar("Result")

SCORE_AGAIN = "Run the `dpo-cache precompute` that made it: it scores only what is missing."
AGAIN = (
    "Run with `repair` to move it aside, then the `dpo-cache precompute` that made it: it scores only "
    "what is missing."
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache. `file` is the file's name from the root of the cache."""

    file: str
    kind: str  # damaged, missing, link, or differs: from another file, and either may be wrong
    expected: str
    found: str
    remedy: str
    other: str | None = None  # the file that it differs from

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.kind}\n  expected {self.expected}\n  found    {self.found}\n  {self.remedy}"
        )


@dataclass
class VerifyReport:
    """The counts of what was checked, and the problems."""

    cache: str
    files: int = 0
    bytes: int = 0
    references: int = 0
    completions: int = 0  # rows of score shards that are whole
    pair_sets: int = 0
    pairs: int = 0
    problems: list[Problem] = field(default_factory=list)
    # parts that no manifest names: of replaced pair sets, or of a writer at work
    unreferenced: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # files of no kind that a cache has
    repair: Any = None  # the `RepairReport` of `dpo_cache.verify(..., repair=True)`
    rescored: list[Any] = field(default_factory=list)  # its `RescoreReport`s, one for each reference
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<VerifyReport of {self.cache}: {self.files:,} files, {self.pairs:,} pairs, "
            f"{len(self.problems):,} problems>"
        )

    @property
    def is_whole(self) -> bool:
        return not self.problems


def verify_cache(location: str | os.PathLike[str], *, on_progress: OnProgress | None = None) -> VerifyReport:
    """Check every byte of the cache at a path or URL. Raises `FormatError` where there is none, or a newer
    one.

    Files that other processes publish meanwhile are not checked, and files that they remove are no problem.
    """
    folder, _ = open_for_upkeep(location)
    return _Verification(folder, on_progress or (lambda *_: None)).run()


@dataclass
class _Scored:
    """The undamaged files of one reference: its identity, and the files that hold its log-probs."""

    identity: Document = field(default_factory=dict)
    shards: list[WholeShard] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)


class _Verification:
    """One pass over a cache."""

    def __init__(self, folder: Folder, on_progress: OnProgress):
        self.folder, self.on_progress = folder, on_progress
        self.report = VerifyReport(str(folder))
        self.links = folder.links()
        beyond = tuple(f"{link}/" for link in self.links)
        self.files = {
            name: size
            for name, size in folder.files().items()
            if name not in self.links and not name.startswith(beyond)
        }
        self.kinds = {name: classify(name) for name in self.files}
        self.done = 0
        self.references: dict[str, _Scored] = {}

    def run(self) -> VerifyReport:
        self.report.files, self.report.bytes = len(self.files), sum(self.files.values())
        for name in self.links:
            remedy = "Copy what it points to into the cache, or remove it."
            self._note(name, "link", "only files, none of them a link", "a symbolic link", remedy)
        self._check_format()
        for reference_id in self._names_of("reference", "shard"):
            self._check_reference(reference_id)
        for name in self._names_of("manifest", "part"):
            self._check_pair_set(name)
        for scored in self.references.values():
            self._compare(scored)
        self.report.unknown = [name for name, (kind, _) in self.kinds.items() if kind == "unknown"]
        self.report.problems = sorted(
            set(self.report.problems), key=lambda problem: (problem.file, problem.kind, problem.expected)
        )
        return self.report

    def _names_of(self, *kinds: str) -> list[str]:
        """References, or pair sets, that have a file of one of these kinds."""
        return sorted({parts[0] for kind, parts in self.kinds.values() if kind in kinds})

    # -- format.json, references -----------------------------------------------------------------------

    def _check_format(self) -> None:
        remedy = "Run with `repair` to write it again."
        if "format.json" not in self.files:
            self._note("format.json", "missing", str(FORMAT), "no such file", remedy)
        elif (content := self._read("format.json")) is not None and content != render_document(FORMAT):
            found = content[:80].decode(errors="backslashreplace").replace("\n", " ").strip()
            self._note("format.json", "damaged", str(FORMAT), found or "an empty file", remedy)

    def _check_reference(self, reference_id: str) -> None:
        self.report.references += 1
        name = f"references/{reference_id}/reference.json"
        identity: Document = {}
        if name not in self.files:
            self._note(name, "missing", "the reference that these scores are of", "no such file", SCORE_AGAIN)
        else:
            self._count(name)
            identity = self._try(name, lambda: read_reference(self.folder, reference_id)["identity"]) or {}
        scored = self.references[reference_id] = _Scored(identity)
        for file, (kind, parts) in self.kinds.items():
            if kind == "shard" and parts[0] == reference_id and (content := self._read(file)) is not None:
                scored.shards += filter(None, [self._try(file, partial(check_shard, file, content))])
        self.report.completions += sum(shard.num_rows for shard in scored.shards)

    # -- pair sets -------------------------------------------------------------------------------------

    def _check_pair_set(self, name: str) -> None:
        """Check the manifest, every part that it names, and that the parts have its pairs."""
        file = f"pairs/{name}/manifest.json"
        present = {part for part, (kind, parts) in self.kinds.items() if kind == "part" and parts[0] == name}
        if file not in self.files:
            self.report.unreferenced += sorted(present)
            return
        self._count(file)
        manifest = self._try(
            file, lambda: check_details(read_manifest(self.folder, f"pairs/{name}"), f"{self.folder}/{file}")
        )
        if manifest is None:  # its parts are unknown
            return
        self.report.pair_sets += 1
        named = part_files(manifest)
        self.report.unreferenced += sorted(present - named.keys())
        digest, num_problems = PairsDigest(), len(self.report.problems)
        has_token_logps = manifest.get("token_logps", True)
        for part, promised in named.items():
            if self._check_part(part, promised, digest, has_token_logps):
                if has_token_logps:  # imported sums have no values to compare
                    self.references.setdefault(manifest["reference"], _Scored()).parts.append(part)
                self.report.pairs += promised["rows"]
        if len(self.report.problems) == num_problems:
            self._check_manifest_values(file, manifest, digest.hexdigest())

    def _check_part(self, file: str, part: Document, digest: PairsDigest, has_token_logps: bool) -> bool:
        if file not in self.files:
            expected = f"{part['rows']} pairs, {part['bytes']} bytes, as the manifest says"
            self._note(file, "missing", expected, "no such file", SCORE_AGAIN)
            return False
        if (content := self._read(file)) is None:
            return False
        check = partial(check_part, file, content, part, digest, has_token_logps=has_token_logps)
        return self._try(file, check) is not None

    def _check_manifest_values(self, file: str, manifest: Document, digest: str) -> None:
        if digest != manifest["pairs_digest"]:
            expected = f"pairs whose digest is {manifest['pairs_digest'][:12]}…"
            found = f"parts whose pairs have the digest {digest[:12]}…"
            self._note(file, "damaged", expected, found, AGAIN)
        reference = f"references/{manifest['reference']}/reference.json"
        if reference not in self.files:
            self._note(reference, "missing", f"the reference that {file} names", "no such file", SCORE_AGAIN)

    # -- files compared with each other ----------------------------------------------------------------

    def _compare(self, scored: _Scored) -> None:
        """Compare the values that shards and pair sets hold of one completion, with the dtype's tolerance."""
        allowed = allowed_gap(scored.identity)
        num_bytes = sum(4 * shard.num_tokens for shard in scored.shards)
        shards, parts = [shard.file for shard in scored.shards], scored.parts
        try:
            found_apart = compare_files(self.folder, shards, parts, allowed, num_bytes)
        except CacheError:
            left = [[file for file in files if self.folder.exists(file)] for files in (shards, parts)]
            if left == [shards, parts]:
                raise
            # others were compacted meanwhile
            found_apart = compare_files(self.folder, left[0], left[1], allowed, num_bytes)
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

    def _read(self, file: str) -> bytes | None:
        """The file's bytes; None, with the problem noted, where they cannot be read."""
        self._count(file)
        return self._try(file, lambda: self.folder.read(file))

    def _count(self, file: str) -> None:
        self.done += self.files[file]
        self.on_progress(self.done, self.report.bytes)

    def _try(self, file: str, check: Callable[[], Result]) -> Result | None:
        """The result of the check; None, with its problem noted, where it raises `CacheError`."""
        try:
            return check()
        except CacheError as error:
            if self.folder.exists(file):  # else it was collected or compacted since the listing
                found = first_line(error).removeprefix(f"{self.folder}/{file}: ").removeprefix(f"{file}: ")
                self._note(file, "damaged", "the bytes that were published", found, AGAIN)
            return None

    def _note(
        self, file: str, kind: str, expected: str, found: str, remedy: str, other: str | None = None
    ) -> None:
        self.report.problems.append(Problem(file, kind, expected, found.rstrip("."), remedy, other))
