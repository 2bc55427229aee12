"""The pairs for which a plan is made: those of a pair set or of a data set, or pairs of typical lengths."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_cache import data
from dpo_cache.errors import DataError
from dpo_cache.lm.forest.layout import count_forest_tokens, group_by_tokens
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.precompute import renamed_columns
from dpo_cache.store import open_cache
from dpo_cache.types import Completion, Pair

if TYPE_CHECKING:
    from datasets import Dataset

TYPICAL_PROMPT, TYPICAL_ANSWER, TYPICAL_PAIRS = 512, 256, 10_000
WINDOW = 16_384  # pairs whose shared prefixes are found together, as in `precompute`
SCORED_TOKENS = 2**17  # enough for several of the largest chunks of scoring


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens over all pairs, and the pairs of the longest step."""

    source: str  # the origin of the pairs, for the report
    is_assumed: bool  # True for pairs of typical lengths
    num_pairs: int
    mean_prompt: float
    mean_answer: float
    longest: int  # the longest prompt with its answer
    row_tokens: int  # all prompts and answers; a prompt counts once for each of its answers
    forest_tokens: int  # the tokens that `precompute` runs: a prefix that pairs of a window share counts once
    pair_tokens: float  # mean tokens of a pair in a training step: its prompt once, and both answers
    longest_pairs: tuple[Pair, ...]  # as many as a step has, longest first
    scored: tuple[Completion, ...]  # some pairs, the longest one included, for the memory of scoring

    def forests(self, budget_tokens: int, *, splits_pairs: bool = False) -> list[list[Completion]]:
        """The completions of the step with the longest pairs, in forests of at most so many tokens, as
        `train` fills them, the largest first. A longer pair is a forest by itself; with `splits_pairs`, as
        under a given `budget_tokens`, each of its answers is one.
        """
        ordered = sorted(
            self.longest_pairs, key=lambda pair: pair.chosen.sequence_ids.astype(">u4").tobytes()
        )
        groups = group_by_tokens(
            ordered, budget_tokens, lambda pairs: count_forest_tokens(_completions_of(pairs))
        )
        largest_first = sorted(groups, key=lambda group: group[1], reverse=True)
        forests: list[list[Completion]] = []
        for pairs, num_tokens in largest_first:
            completions = _completions_of(pairs)
            is_split = splits_pairs and num_tokens > budget_tokens
            forests += [[side] for side in completions] if is_split else [completions]
        return sorted(forests, key=count_forest_tokens, reverse=True)


def read_workload(options: PlanOptions, vocab_size: int) -> Workload:
    """The pairs that the options name. Raises `CacheError`, `DataError` or `ModelError`."""
    if options.cache is not None:
        pair_set = open_cache(options.cache).choose_pairs(options.pairs, "to plan for")
        pairs: Iterable[Pair] = (scored.pair for scored in pair_set)
        return measure(pairs, f"{pair_set.name} of {options.cache}", options.batch_size)
    if options.dataset is not None:
        return measure(_tokenized(options), options.dataset, options.batch_size)
    return typical(options.batch_size, vocab_size)


def typical(batch_size: int, vocab_size: int, num_pairs: int = TYPICAL_PAIRS) -> Workload:
    """Pairs of prompts of 512 tokens and answers of 256, none of which share anything."""
    generator = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, vocab_size, length).astype(np.uint32)

    pairs = []
    pair_tokens = TYPICAL_PROMPT + 2 * TYPICAL_ANSWER
    for row in range(max(batch_size, SCORED_TOKENS // pair_tokens)):
        prompt = ids(TYPICAL_PROMPT)
        pairs.append(Pair(row, *(Completion(prompt, ids(TYPICAL_ANSWER)) for _ in ("chosen", "rejected"))))
    row_tokens = TYPICAL_PROMPT + TYPICAL_ANSWER
    return Workload(
        source=f"assumed: prompts of {TYPICAL_PROMPT} tokens, answers of {TYPICAL_ANSWER}",
        is_assumed=True,
        num_pairs=num_pairs,
        mean_prompt=TYPICAL_PROMPT,
        mean_answer=TYPICAL_ANSWER,
        longest=row_tokens,
        row_tokens=2 * num_pairs * row_tokens,
        forest_tokens=num_pairs * pair_tokens,
        pair_tokens=pair_tokens,
        longest_pairs=tuple(pairs[:batch_size]),
        scored=tuple(_completions_of(pairs)),
    )


def measure(pairs: Iterable[Pair], source: str, batch_size: int) -> Workload:
    """The lengths of these pairs, which are read once. Raises `DataError` where there are none."""
    num_pairs = prompt = answer = longest = row_tokens = forest_tokens = pair_tokens = 0
    largest: list[tuple[int, int, Pair]] = []
    some: list[Pair] = []
    some_tokens = 0
    rest = iter(pairs)
    while window := list(islice(rest, WINDOW)):
        completions = _completions_of(window)
        forest_tokens += count_forest_tokens(completions)
        for side in completions:
            prompt, answer = prompt + len(side.prompt_ids), answer + side.num_tokens
        longest = max(longest, *map(len, completions))
        row_tokens += sum(map(len, completions))
        pair_tokens += sum(len(pair.chosen) + pair.rejected.num_tokens for pair in window)
        for pair in window if some_tokens < SCORED_TOKENS else ():
            if some_tokens < SCORED_TOKENS:
                some.append(pair)
                some_tokens += len(pair.chosen) + pair.rejected.num_tokens
        numbered = (
            (len(pair.chosen) + len(pair.rejected), -number, pair)
            for number, pair in enumerate(window, num_pairs)
        )
        largest = heapq.nlargest(batch_size, [*largest, *numbered])
        num_pairs += len(window)
    if not num_pairs:
        raise DataError(f"{source}: no row of it makes a pair.")
    longest_pairs = tuple(pair for _, _, pair in largest)
    return Workload(
        source=source,
        is_assumed=False,
        num_pairs=num_pairs,
        mean_prompt=prompt / (2 * num_pairs),
        mean_answer=answer / (2 * num_pairs),
        longest=longest,
        row_tokens=row_tokens,
        forest_tokens=forest_tokens,
        pair_tokens=pair_tokens / num_pairs,
        longest_pairs=longest_pairs,
        scored=tuple(_completions_of([*longest_pairs, *some])),
    )


def _tokenized(options: PlanOptions) -> Iterator[Pair]:
    """The pairs of the data set, as `precompute` makes them."""
    location = options.tokenizer or locate_checkpoint(options.model).tokenizer[0]
    revision = None if options.tokenizer else locate_checkpoint(options.model).tokenizer[1]
    tokenizer = data.load_tokenizer(
        location,
        revision=revision,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
    )
    truncation = data.Truncation(options.max_length, options.truncation, options.max_prompt_length)
    tables = data.read_dataset(
        options.dataset, options.split, options.limit, streaming=False, rename=renamed_columns(options.map)
    )
    for split, rows in tables.items():
        place = f"{options.dataset}: split {split}"
        chosen = None if options.format == "auto" else options.format
        first = data.deciding_row(rows, place, chosen)
        columns = list(rows.column_names or first)
        data_format = (
            data.detect_format(columns, first, place)
            if chosen is None
            else data.check_format(chosen, columns, place)
        )
        windows: Iterator[Dataset] = data.tokenized_windows(
            rows, data_format, tokenizer, window_rows=WINDOW, spool=Path(), place=place
        )
        for window in windows:
            for outcome in data.make_pairs(window, truncation):
                if isinstance(outcome.pair, Pair):
                    yield outcome.pair


def _completions_of(pairs: Iterable[Pair]) -> list[Completion]:
    """All chosen completions, then all rejected ones."""
    pairs = list(pairs)
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
