"""Tokenized rows -> windows, with the completions that the cache lacks and their number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig

from dpo_cache import data
from dpo_cache.errors import ModelError
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.positions import most_positions
from dpo_cache.store import ScoreIndex, completion_key
from dpo_cache.store.format.keys import key_array, key_bytes
from dpo_cache.store.format.pair_tables import PairsDigest
from dpo_cache.store.key_table import KeyTable, keys_of_pairs
from dpo_cache.types import Completion, Pair

Entry = tuple[bytes, Completion, Sequence[int]]  # a key, its completion, and rows that have it


@dataclass(frozen=True)
class Window:
    """Some tokenized rows of a split, and the keys (dtype S16) of their pairs, in order."""

    rows: Dataset
    chosen_keys: np.ndarray
    rejected_keys: np.ndarray
    missing_keys: np.ndarray  # distinct; neither in the cache nor in an earlier window
    missing_tokens: int  # tokens of the forest of the missing completions
    longest: Entry | None = None  # the longest missing completion


@dataclass
class Totals:
    """Sums over the windows planned so far."""

    distinct_completions: int = 0
    already_cached: int = 0
    missing_tokens: int = 0
    missing_pairs: int = 0


@dataclass
class SplitPlan:
    """A split that becomes a pair set: its rows, and the survey and windows of the rows planned so far."""

    name: str
    rows: data.Rows
    survey: data.Survey
    windows: list[Window] = field(default_factory=list)
    digest: PairsDigest = field(default_factory=PairsDigest)
    template_date: date | None = None  # the day that the chat template writes, if it writes one
    pairs_seen: KeyTable = field(default_factory=KeyTable)  # numbers of both completions -> index of the pair


class Planner:
    """Plans one window after the other; each distinct completion is missing from at most one of them."""

    def __init__(self, scores: ScoreIndex, truncation: data.Truncation, config: PreTrainedConfig, model: str):
        self.totals = Totals()
        self._scores, self._truncation, self._model = scores, truncation, model
        text_config = config.get_text_config()
        self._vocab_size = text_config.vocab_size
        self._positions = most_positions(config)
        self._completions_seen, self._num_seen = KeyTable(), 0

    def plan(self, split: SplitPlan, windows: Iterator[Dataset]) -> Iterator[Window]:
        """Yield the plan of each window of tokenized rows, and add it to the split.

        Raises `ModelError` for ids or positions that the model has no embedding for.
        """
        for rows in windows:
            window = self._plan_window(split, rows)
            split.windows.append(window)
            self._check_lengths(split.survey.longest)
            yield window

    def _plan_window(self, split: SplitPlan, rows: Dataset) -> Window:
        kept: list[Pair] = []
        for outcome in data.make_pairs(rows, self._truncation):
            split.survey.add(outcome)
            if isinstance(outcome.pair, Pair):
                kept.append(outcome.pair)
        completions = [pair.chosen for pair in kept] + [pair.rejected for pair in kept]
        self._check_ids(kept)
        keys = key_array([completion_key(completion) for completion in completions])
        chosen_keys, rejected_keys = np.split(keys, 2)
        numbers, is_new = self._number(keys)
        _note_repeats(split, [pair.row for pair in kept], *np.split(numbers, 2))
        for pair, chosen_key, rejected_key in zip(
            kept, key_bytes(chosen_keys), key_bytes(rejected_keys), strict=True
        ):
            split.digest.add(pair.row, chosen_key, rejected_key)
        lacks_score = ~self._scores.contains(keys)
        missing = np.flatnonzero(is_new & lacks_score)
        distinct = np.unique(keys, return_index=True)[1]
        forest_tokens = count_forest_tokens([completions[place] for place in distinct])
        missing_tokens = (
            forest_tokens
            if len(missing) == len(distinct)
            else count_forest_tokens([completions[place] for place in missing])
        )
        split.survey.forest_tokens += forest_tokens
        self.totals.distinct_completions += int(is_new.sum())
        self.totals.already_cached += int((is_new & ~lacks_score).sum())
        self.totals.missing_tokens += missing_tokens
        self.totals.missing_pairs += int(np.logical_or(*np.split(lacks_score, 2)).sum())
        return Window(
            rows,
            chosen_keys,
            rejected_keys,
            keys[missing],
            missing_tokens,
            _longest([(keys[place], completions[place], kept[place % len(kept)].row) for place in missing]),
        )

    def _number(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of each distinct completion, and a mask of the places that are the first with theirs."""
        places = self._num_seen + np.arange(len(keys))
        self._completions_seen.add(keys, self._num_seen)
        self._num_seen += len(keys)
        numbers = self._completions_seen.find(keys)
        return numbers, numbers == places

    def _check_ids(self, pairs: Sequence[Pair]) -> None:
        """Raise `ModelError` for token ids without an embedding. Tokens that only the tokenizer has do no
        harm as long as no row contains them.
        """
        for pair in pairs:
            largest = max(int(side.sequence_ids.max()) for side in (pair.chosen, pair.rejected))
            if largest >= self._vocab_size:
                raise ModelError(
                    f"row {pair.row}: the tokenizer makes token id {largest}, but {self._model} has "
                    f"{self._vocab_size} embeddings.\n"
                    "Use the model's own tokenizer, or, if the token was added to it, a model that has it."
                )

    def _check_lengths(self, longest: int) -> None:
        if self._positions and longest > self._positions:
            raise ModelError(
                f"a sequence has {longest} tokens, but {self._model} was made for {self._positions} at "
                "most.\n"
                f"Cut sequences to a max_length of {self._positions}."
            )


def _longest(missing: Sequence[tuple[np.bytes_, Completion, int]]) -> Entry | None:
    """The entry of the longest completion, if there is one; its arrays are copies."""
    if not missing:
        return None
    key, completion, row = max(missing, key=lambda entry: len(entry[1]))
    copied = Completion(completion.prompt_ids.copy(), completion.completion_ids.copy())
    return key_bytes(np.array([key]))[0], copied, [row]


def _note_repeats(
    split: SplitPlan, rows: Sequence[int], chosen_numbers: np.ndarray, rejected_numbers: np.ndarray
) -> None:
    """Count the pairs that an earlier row also has, in the same order or the opposite one."""
    pairs = keys_of_pairs(chosen_numbers, rejected_numbers)
    before = split.survey.pairs_kept - len(rows)
    places = before + np.arange(len(rows))
    split.pairs_seen.add(pairs, before)
    opposite = split.pairs_seen.find(keys_of_pairs(rejected_numbers, chosen_numbers))
    for place in np.flatnonzero(split.pairs_seen.find(pairs) < places):
        split.survey.duplicates.add(rows[int(place)])
    for place in np.flatnonzero((opposite >= 0) & (opposite < places)):
        split.survey.contradictory.add(rows[int(place)])
