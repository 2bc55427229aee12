"""The problems that `verify` finds, each with its file, and their report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpo_cache.store.upkeep.html import verify_html


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a cache. `file` is its name from the root of the cache."""

    file: str
    # damaged: its bytes were read and are not those that were published; missing; link; differs: from another
    # file, and either may be wrong; unreadable: a file or folder that could not be read, whatever its bytes
    kind: str
    expected: str
    found: str
    remedy: str
    other: str | None = None  # the file that it differs from
    sha256: str | None = None  # hash of the bytes that were read

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
    files_read: int = 0
    bytes_read: int = 0
    references: int = 0
    completions: int = 0  # rows of score shards that are whole
    pair_sets: int = 0
    pairs: int = 0  # in parts that are whole
    problems: list[Problem] = field(default_factory=list)
    # parts that no manifest names, and scores of references without an entry: of replaced pair sets, of a
    # writer at work, or of a command that was killed
    unreferenced: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # files of no kind that a cache has
    subset: float | None = None  # the share of shards and parts that was to be read; None: all of them
    repair: Any = None  # the `RepairReport` of `dpo_cache.verify(..., repair=True)`
    rescored: list[Any] = field(default_factory=list)  # its `RescoreReport`s, one for each reference
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<VerifyReport of {self.cache}: {self.files_read:,} of {self.files:,} files read, "
            f"{self.pairs:,} pairs, {len(self.problems):,} problems>"
        )

    def _repr_html_(self) -> str:
        return verify_html(self)

    @property
    def is_whole(self) -> bool:
        """Return whether all files that were to be read were read, and nothing was found wrong with them."""
        return not self.problems

    @property
    def unreadable(self) -> list[Problem]:
        """The problems of what could not be read."""
        return [problem for problem in self.problems if problem.kind == "unreadable"]
