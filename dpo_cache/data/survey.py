"""The survey of a split: its rows, lengths and findings, known before any model is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_cache.data.early_answers import NORMAL
from dpo_cache.data.truncate import Dropped, Outcome
from dpo_cache.errors import DataError, shown_rows

if TYPE_CHECKING:
    from dpo_cache.data.shown_rows import ShownRow

PERCENTILES = (0, 50, 90, 99, 100)
ROWS_SHOWN = 3
MIN_EARLY = 4  # fewest pairs with an early answer that are a sign of a wrong format and not chance


@dataclass
class Finding:
    """The number of rows with something worth a remark, and the first of them."""

    count: int = 0
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last = -1

    def add(self, row: int) -> None:
        """Count a row once, however many pairs it makes."""
        if row == self._last:
            return
        self._last = row
        self.count += 1
        if len(self.rows) < ROWS_SHOWN:
            self.rows.append(row)

    def shown_rows(self) -> str:
        """The first rows, as `0, 3, 4, …`."""
        return shown_rows(self.rows, count=self.count)


@dataclass
class Survey:
    """Counts over the tokenized rows of a split, gathered row by row; lengths in tokens."""

    pair_set: str
    data_format: str
    rows_read: int = 0
    pairs_kept: int = 0
    data_tokens: int = 0  # prompt + answer of every completion kept, as an unpadded batch would run them
    forest_tokens: int = 0  # the same with every prefix that completions of a window share counted once
    truncated: Finding = field(default_factory=Finding)
    moved_boundary: Finding = field(default_factory=Finding)
    duplicates: Finding = field(default_factory=Finding)  # the same pair as an earlier row
    contradictory: Finding = field(default_factory=Finding)  # an earlier row prefers the other answer
    dropped: dict[str, Finding] = field(default_factory=dict)  # by reason
    notes: dict[str, Finding] = field(default_factory=dict)  # by what happened to the row
    shown: list[ShownRow] = field(default_factory=list)  # some rows as text, see `show_rows`

    def __post_init__(self) -> None:
        self._last_row = -1
        self._early_pairs = 0
        self._announced: set[str] = set()
        self._lengths: dict[str, Counter[int]] = {
            name: Counter() for name in ("prompt", "answer", "prompt + answer")
        }

    def add(self, outcome: Outcome) -> None:
        """Count one tokenized row."""
        row, pair, was_cut, has_moved, notes = outcome
        self.rows_read += row != self._last_row  # a ranked row makes several pairs
        self._last_row = row
        for note in notes:
            self.notes.setdefault(note, Finding()).add(row)
        if isinstance(pair, Dropped):
            self.dropped.setdefault(pair.reason, Finding()).add(row)
            return
        if was_cut:
            self.truncated.add(row)
        if has_moved:
            self.moved_boundary.add(row)
            self._early_pairs += NORMAL.isdisjoint(notes)
        self.pairs_kept += 1
        for side in (pair.chosen, pair.rejected):
            prompt, answer = len(side.prompt_ids), len(side.completion_ids)
            self._lengths["prompt"][prompt] += 1
            self._lengths["answer"][answer] += 1
            self._lengths["prompt + answer"][prompt + answer] += 1
            self.data_tokens += prompt + answer

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence kept."""
        return max(self._lengths["prompt + answer"], default=0)

    def tokens_of(self, name: str) -> int:
        """Tokens of all prompts, or of all answers; a prompt counts with each of its answers."""
        return sum(length * count for length, count in self._lengths[name].items())

    def lengths(self) -> dict[str, list[int]]:
        """For prompts, answers and both together: the lengths at `PERCENTILES`."""
        return {name: _percentiles(counts) for name, counts in self._lengths.items()}

    def first_remarks(self) -> list[str]:
        """A remark for each note that no earlier call has returned: of a stream, they are not counted yet."""
        new = [note for note in self.notes if note not in self._announced]
        self._announced.update(new)
        return [
            f"{self.pair_set}: {note}: row {self.notes[note].rows[0]} is the first; the end has the count."
            for note in new
        ]

    def remarks(self) -> list[str]:
        """A remark for each note, the most frequent first."""
        return [
            f"{self.pair_set}: {note}: {finding.count:,} of {self.rows_read:,} rows "
            f"(row {finding.shown_rows()})."
            for note, finding in sorted(self.notes.items(), key=lambda entry: -entry[1].count)
        ]

    def check_pairs(self) -> None:
        """Raise `DataError` if no row makes a pair."""
        if not self.pairs_kept:
            reasons = ", ".join(
                f"{reason} ({finding.count}; row {finding.shown_rows()})"
                for reason, finding in self.dropped.items()
            )
            raise DataError(f"no row of {self.pair_set} makes a pair: {reasons}.")

    @property
    def starts_early(self) -> bool:
        """Return whether the answers of most pairs start early, in a way that is not normal.

        Where the prompt is found as the text that two dialogues share, it may end anywhere in a word.
        """
        is_found = self.data_format in ("implicit", "compared")
        return not is_found and self._early_pairs >= MIN_EARLY and self._early_pairs > self.pairs_kept / 2

    def check_boundary(self) -> None:
        """Raise `DataError` if the answers of most pairs start early."""
        if not self.starts_early:
            return
        raise DataError(
            f"the answers of {self._early_pairs:,} of {self.pairs_kept:,} pairs of {self.pair_set} (row "
            f"{self.moved_boundary.shown_rows()}) start early: the ids of prompt + answer do not begin with "
            "the ids of the prompt, so its end would be scored as a part of the answer. In most rows of a "
            "set, that is the sign of a wrong format.\n"
            "Look at some rows with `show` 3. If the prompts are text, end them before the space, or the "
            "word, with which answers continue, and begin the answers with it; if they are messages, give "
            "the `chat_template` that the model was trained with. If the rows are right as they are, use "
            "them with `early_answers` keep."
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"lengths": {"percentiles": list(PERCENTILES), **self.lengths()}}


def _percentiles(counts: Counter[int]) -> list[int]:
    """For each of `PERCENTILES`, the smallest length that this share of the values does not exceed."""
    if not counts:
        return []
    lengths = np.array(sorted(counts))
    reached = np.cumsum([counts[length] for length in lengths])
    return [
        int(lengths[np.searchsorted(reached, np.ceil(reached[-1] * share / 100))]) for share in PERCENTILES
    ]
