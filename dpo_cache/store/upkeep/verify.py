"""Is every byte of a cache what was written, and does it agree with itself?

    report = verify_cache("cache")
    report.problems                      # each names its file, what was expected and found, and what to do

`repair.py` moves what is bad aside.

Every file is read for its own digest, schema and values, one in memory at a time; then shards and pair sets
are read again for their agreement, once for each range of keys (see `comparing.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dpo_cache.errors import CacheError, first_line
from dpo_cache.store.cache import FORMAT, read_reference
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.checks import WholeShard, check_details, check_part, check_shard
from dpo_cache.store.format.documents import Document, render_document
from dpo_cache.store.format.pair_tables import PairsDigest, read_manifest
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
    """Something is not what was written. `file` is its name from the root of the cache."""

    file: str
    # damaged: its bytes or what they say; missing; differs: from another file, either may be wrong; link
    kind: str
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
    """What was looked at, and what is wrong."""

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

    What other processes publish meanwhile is left to the next time; what they remove is not missed.
    """
    folder, _ = open_for_upkeep(location)
    return _Verification(folder, on_progress or (lambda *_: None)).run()


@dataclass
class _Scored:
    """What is whole of one reference: its identity, and the files that hold its log-probs."""

    identity: Document = field(default_factory=dict)
    shards: list[str] = field(default_factory=list)
    num_tokens: int = 0
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
            self._note(
                name,
                "link",
                "files alone, none of them a link",
                "a symbolic link",
                "Copy what it points to into the cache, or remove it.",
            )
        self._check_format()
        for reference_id in sorted(
            {parts[0] for kind, parts in self.kinds.values() if kind in ("reference", "shard")}
        ):
            self._check_reference(reference_id)
        for name in sorted({parts[0] for kind, parts in self.kinds.values() if kind in ("manifest", "part")}):
            self._check_pair_set(name)
        for scored in self.references.values():
            self._compare(scored)
        self.report.unknown = [name for name, (kind, _) in self.kinds.items() if kind == "unknown"]
        self.report.problems = sorted(
            set(self.report.problems), key=lambda problem: (problem.file, problem.kind, problem.expected)
        )
        return self.report

    # -- format.json, references -----------------------------------------------------------------------

    def _check_format(self) -> None:
        expected = render_document(FORMAT)
        if "format.json" not in self.files:
            self._note(
                "format.json", "missing", str(FORMAT), "no such file", "Run with `repair` to write it again."
            )
        elif (content := self._read("format.json")) is not None and content != expected:
            found = content[:80].decode(errors="backslashreplace").replace("\n", " ").strip()
            self._note(
                "format.json",
                "damaged",
                str(FORMAT),
                found or "an empty file",
                "Run with `repair` to write it again.",
            )

    def _check_reference(self, reference_id: str) -> None:
        self.report.references += 1
        name = f"references/{reference_id}/reference.json"
        identity: Document = {}
        if name not in self.files:
            self._note(name, "missing", "the reference that these scores are of", "no such file", SCORE_AGAIN)
        else:
            self._count(name)
            identity = self._try(name, lambda: read_reference(self.folder, reference_id)["identity"]) or {}
        shards = [
            file for file, (kind, parts) in self.kinds.items() if kind == "shard" and parts[0] == reference_id
        ]
        whole = [shard for file in shards if (shard := self._check_shard(file))]
        self.report.completions += sum(shard.num_rows for shard in whole)
        self.references[reference_id] = _Scored(
            identity, [shard.file for shard in whole], sum(shard.num_tokens for shard in whole)
        )

    def _check_shard(self, file: str) -> WholeShard | None:
        content = self._read(file)
        return self._try(file, lambda: check_shard(file, content)) if content is not None else None

    # -- pair sets -------------------------------------------------------------------------------------

    def _check_pair_set(self, name: str) -> None:
        """The manifest, every part that it names, and that together they are the pairs it promises."""
        place = f"pairs/{name}"
        present = {file for file, (kind, parts) in self.kinds.items() if kind == "part" and parts[0] == name}
        if f"{place}/manifest.json" not in self.files:
            self.report.unreferenced += sorted(present)
            return
        self._count(f"{place}/manifest.json")
        manifest = self._try(
            f"{place}/manifest.json",
            lambda: check_details(read_manifest(self.folder, place), f"{self.folder}/{place}/manifest.json"),
        )
        if manifest is None:  # which parts are its own is not known
            return
        self.report.pair_sets += 1
        named = {f"{place}/{part['file']}": part for part in manifest["parts"]}
        self.report.unreferenced += sorted(present - named.keys())
        digest, num_problems, has_token_logps = (
            PairsDigest(),
            len(self.report.problems),
            manifest.get("token_logps", True),
        )
        for file, part in named.items():
            if self._check_part(file, part, digest, has_token_logps):
                if has_token_logps:  # sums alone are imported: there is nothing to hold them against
                    self.references.setdefault(manifest["reference"], _Scored()).parts.append(file)
                self.report.pairs += part["rows"]
        if len(self.report.problems) == num_problems:
            self._check_manifest_values(f"{place}/manifest.json", manifest, digest.hexdigest())

    def _check_part(self, file: str, part: Document, digest: PairsDigest, has_token_logps: bool) -> bool:
        if file not in self.files:
            self._note(
                file,
                "missing",
                f"{part['rows']} pairs, {part['bytes']} bytes, as the manifest says",
                "no such file",
                SCORE_AGAIN,
            )
            return False
        content = self._read(file)
        return (
            content is not None
            and self._try(
                file, lambda: check_part(file, content, part, digest, has_token_logps=has_token_logps)
            )
            is not None
        )

    def _check_manifest_values(self, file: str, manifest: Document, digest: str) -> None:
        if digest != manifest["pairs_digest"]:
            found = f"parts whose pairs have the digest {digest[:12]}…"
            self._note(
                file, "damaged", f"pairs whose digest is {manifest['pairs_digest'][:12]}…", found, AGAIN
            )
        if manifest["reference"] not in {
            parts[0] for kind, parts in self.kinds.values() if kind == "reference"
        }:
            reference = f"references/{manifest['reference']}/reference.json"
            self._note(reference, "missing", f"the reference that {file} names", "no such file", SCORE_AGAIN)

    # -- files beside each other -----------------------------------------------------------------------

    def _compare(self, scored: _Scored) -> None:
        """Score shards that hold one completion, and pair sets made of them, within the tolerance of the
        dtype.
        """
        allowed = allowed_gap(scored.identity)
        shards, parts = scored.shards, scored.parts
        try:
            found_apart = compare_files(self.folder, shards, parts, allowed, 4 * scored.num_tokens)
        except CacheError:
            left = [file for file in [*shards, *parts] if self.folder.exists(file)]
            if len(left) == len(shards) + len(parts):
                raise
            shards, parts = (
                [file for file in shards if file in left],
                [file for file in parts if file in left],
            )
            # the rest was compacted meanwhile
            found_apart = compare_files(self.folder, shards, parts, allowed, 4 * scored.num_tokens)
        for apart in found_apart:
            file = (
                apart.file
                if classify(apart.file)[0] == "shard"
                else f"{apart.file.rpartition('/')[0]}/manifest.json"
            )
            gap = (
                "another number of tokens"
                if apart.largest_gap == float("inf")
                else f"a gap of up to {apart.largest_gap:.2g} nats"
            )
            found = f"{gap} in {apart.num_completions} of them"
            remedy = (
                "Either may be wrong: `--rescore N --model MODEL` tells which; `repair` moves both aside."
            )
            self._note(
                file,
                "differs",
                f"the log-probs that {apart.other} has, within {allowed:g} nats a token",
                found,
                remedy,
                apart.other,
            )

    # -- reading ---------------------------------------------------------------------------------------

    def _read(self, file: str) -> bytes | None:
        """The file's bytes; None, with its problem noted, where they cannot be read."""
        self._count(file)
        return self._try(file, lambda: self.folder.read(file))

    def _count(self, file: str) -> None:
        self.done += self.files[file]
        self.on_progress(self.done, self.report.bytes)

    def _try(self, file: str, check: Callable[[], Result]) -> Result | None:
        """What the check gives; None, with its problem noted, where it raises `CacheError`."""
        try:
            return check()
        except CacheError as error:
            if not self.folder.exists(file):  # gone since the listing: collected or compacted
                return None
            place = f"{self.folder}/{file}: "
            self._note(
                file,
                "damaged",
                "the bytes that were published",
                first_line(error).removeprefix(place).removeprefix(f"{file}: "),
                AGAIN,
            )
            return None

    def _note(
        self, file: str, kind: str, expected: str, found: str, remedy: str, other: str | None = None
    ) -> None:
        self.report.problems.append(Problem(file, kind, expected, found.rstrip("."), remedy, other))
