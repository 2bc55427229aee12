"""Token ids of a row -> a pair within `max_length`, or the reason to drop the row.

keep-start    each sequence keeps its first max_length tokens
keep-end      each sequence keeps its last max_length tokens, so the two prompts may differ
prompt-left   if a sequence is too long, the prompt keeps its last max_prompt_length tokens; if a sequence
              is still too long, both answers keep their first max_length - max_prompt_length tokens (the
              original DPO repository's rule)
drop          a row with a sequence that is too long is dropped
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from dpo_cache.types import Completion, Pair, TokenIds, split_lists

EQUAL = "chosen equals rejected"
EQUAL_AFTER_CUT = "chosen equals rejected after truncation"
PROMPT_FILLS = "prompt leaves no room for an answer within max_length"
TOO_LONG = "longer than max_length"
NO_ANSWER = "no answer tokens"
NO_PROMPT = "no prompt tokens to predict the answers from"


@dataclass(frozen=True)
class Truncation:
    """How sequences are cut: lengths in tokens, the modes as in the module's docstring."""

    max_length: int = 1024
    mode: str = "keep-start"
    max_prompt_length: int | None = None  # prompt-left only; half of max_length by default


@dataclass(frozen=True)
class Dropped:
    """The result of a row that makes no pair."""

    reason: str


class Outcome(NamedTuple):
    """The result of one tokenized row."""

    row: int
    pair: Pair | Dropped
    was_cut: bool
    moved_boundary: bool
    notes: tuple[str, ...] = ()


def make_pairs(window: Dataset, truncation: Truncation) -> Iterator[Outcome]:
    """One outcome for each row that `tokenize_rows` made, in order."""
    table: pa.Table = window.with_format("arrow")[:]
    rows, moved, dropped, problems, notes = (
        table.column(name).to_pylist() for name in ("row", "moved_boundary", "dropped", "problem", "notes")
    )
    ids = (split_lists(table.column(name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    for row, has_moved, of_pair, of_problem, of_row, prompt, chosen, rejected in zip(
        rows, moved, dropped, problems, notes, *ids, strict=True
    ):
        reason = of_problem or of_pair
        if reason is not None:
            yield Outcome(row, Dropped(reason), False, False, tuple(of_row))
        else:
            yield Outcome(
                row, *make_pair(row, prompt, chosen, rejected, truncation), has_moved, tuple(of_row)
            )


def kept_pairs(window: Dataset, truncation: Truncation) -> list[Pair]:
    """The pairs that these rows make, in order."""
    return [outcome.pair for outcome in make_pairs(window, truncation) if isinstance(outcome.pair, Pair)]


def make_pair(
    row: int, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds, truncation: Truncation
) -> tuple[Pair | Dropped, bool]:
    """The pair, or the reason why there is none; and whether anything was cut off."""
    if np.array_equal(chosen, rejected):
        return Dropped(EQUAL), False
    if not len(prompt):
        return Dropped(NO_PROMPT), False
    if not len(chosen) or not len(rejected):
        return Dropped(NO_ANSWER), False
    is_long = len(prompt) + max(len(chosen), len(rejected)) > truncation.max_length
    if is_long and truncation.mode == "drop":
        return Dropped(TOO_LONG), False
    if is_long and truncation.mode == "keep-start" and len(prompt) >= truncation.max_length:
        return Dropped(PROMPT_FILLS), False
    if is_long and truncation.mode == "prompt-left":
        room = truncation.max_prompt_length or truncation.max_length // 2
        prompt = prompt[-room:]
        if len(prompt) + max(len(chosen), len(rejected)) > truncation.max_length:
            chosen, rejected = (answer[: truncation.max_length - room] for answer in (chosen, rejected))
    one, other = (_cut(prompt, answer, truncation) for answer in (chosen, rejected))
    if one is None or other is None:
        return Dropped(NO_ANSWER), is_long
    pair = Pair(row, chosen=one, rejected=other)
    if is_long and np.array_equal(pair.chosen.sequence_ids, pair.rejected.sequence_ids):
        return Dropped(EQUAL_AFTER_CUT), is_long
    return pair, is_long


def _cut(prompt: TokenIds, answer: TokenIds, truncation: Truncation) -> Completion | None:
    """The completion within max_length; None where no token of the answer is left to score."""
    sequence = np.concatenate([prompt, answer])
    boundary = len(prompt)
    if truncation.mode == "keep-end":
        cut = max(0, len(sequence) - truncation.max_length)
        sequence, boundary = sequence[cut:], max(0, boundary - cut)
    else:
        sequence = sequence[: truncation.max_length]
    boundary = max(boundary, 1)  # nothing predicts the first token of a sequence: it serves as the prompt
    return Completion(sequence[:boundary], sequence[boundary:]) if boundary < len(sequence) else None
