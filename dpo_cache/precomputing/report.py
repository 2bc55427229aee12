"""What `precompute` tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpo_cache import data


@dataclass
class PrecomputeReport:
    """What `precompute` did; counts are sums over the splits, `surveys` tells them apart."""

    pair_sets: list[str] = field(default_factory=list)
    cache: str = ""
    reference: str = ""
    attention: str | None = None  # None: no model was loaded
    budget_tokens: int | None = None  # run through the model at once
    rows_read: int = 0
    pairs_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # rows by reason
    rows_truncated: int = 0
    rows_moved_boundary: int = 0
    completions: int = 0
    distinct_completions: int = 0
    already_cached: int = 0
    scored_now: int = 0
    missing_tokens: int = 0  # of the forest of what the cache lacked
    data_tokens: int = 0  # prompt + answer of every completion kept, as an unpadded batch would run them
    model_tokens: int = 0  # actually run
    elapsed_s: float = 0.0
    scoring_s: float = 0.0  # the part of it spent in the model
    pairs_per_s: float = 0.0
    peak_bytes: int = 0
    loaded_bytes: int = 0  # peak when the model had just been loaded
    bytes_written: int = 0
    surveys: list[dict[str, Any]] = field(default_factory=list)
    start_from: str | None = (
        None  # to be given as --model in training: the checkpoint that the reference records is gone
    )

    def add(self, survey: data.Survey) -> None:
        """Take in what one split holds."""
        self.rows_read += survey.rows_read
        self.pairs_kept += survey.pairs_kept
        for reason, finding in survey.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + finding.count
        self.rows_truncated += survey.truncated.count
        self.rows_moved_boundary += survey.moved_boundary.count
        self.completions += 2 * survey.pairs_kept
        self.data_tokens += survey.data_tokens
        self.surveys.append(survey.as_dict())
