"""The rows of the self-check: how long they are, how far into a chunk they are placed, and what they cost.

A check costs at most these tokens, besides a few short rows (some 130 tokens, run about four times):

- lengths that the config names, and all lengths of code outside transformers: `START_TOKENS` = 2,048, and
  `SHARE` = 5% of the tokens that the run itself will run;
- the data's longest row and the largest chunk, where the config names no length on the way: the same 5%.

So a run of 20,000 tokens of a plain Llama spends 1,000 tokens, and one that knows nothing of its data spends
`UNKNOWN_RUN_TOKENS` = 16,384 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dpo_cache.lm.config_limits import Limit
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.types import Completion

START_TOKENS = 2048
SHARE = 0.05
UNKNOWN_RUN_TOKENS = 16384

MARGIN = 24  # tokens that a row runs past a limit
ANSWER_TOKENS = 20  # tokens of a long row that are compared
FREE_TOKENS = 128  # rows up to this length are always run


@dataclass(frozen=True)
class Run:
    """The known plans of the run for the model."""

    longest: int  # tokens of the longest row
    chunk_tokens: int  # tokens of the largest chunk or forest that is run at once
    tokens: int | None = None  # tokens of the whole run; None: not known
    num_ways: int = 1  # ways in which the long rows are run: streamed in chunks, as whole forests, or both

    @property
    def optional_tokens(self) -> int:
        """The most tokens that the check may run where no length is named."""
        return UNKNOWN_RUN_TOKENS if self.tokens is None else int(SHARE * self.tokens)

    @property
    def needed_tokens(self) -> int:
        """The most tokens that the check may run to pass the lengths that are named."""
        return UNKNOWN_RUN_TOKENS if self.tokens is None else START_TOKENS + self.optional_tokens


@dataclass(frozen=True)
class CheckRows:
    """The rows that are compared, what is run in front of them, and what they do not reach."""

    short: list[Completion]  # shared prompts, a shared start of the answer, a tree of its own
    long: list[Completion]  # prefixes of one sequence, ascending; the last tokens of each are compared
    filler: list[Completion]  # sorted before all others, so that these are at the end of a chunk
    chunk_tokens: int  # tokens of the largest chunk that is checked
    # lengths that rows of the data pass, but no row of the check
    unreached: list[Limit] = field(default_factory=list)

    @property
    def compared(self) -> list[Completion]:
        return [*self.short, *self.long]

    @property
    def longest(self) -> int:
        return max(map(len, self.compared))


def plan_rows(
    vocab_size: int,
    limits: Sequence[Limit],
    run: Run,
    *,
    is_known_code: bool = True,
    most_length: int | None = None,
) -> CheckRows:
    """The rows of the check for a run, within its cost; no row is longer than `most_length`.

    Rows pass every limit that rows of the data pass, and reach the longest row of the data. In front of them,
    other rows fill the largest chunk. Without `is_known_code`, any length may matter.
    """
    short = short_rows(vocab_size, run.longest)
    most = run.longest if most_length is None else min(run.longest, most_length)
    marks: list[int] = []
    unreached: list[Limit] = []
    wanted = [
        (min(limit.tokens + MARGIN, run.longest), limit) for limit in limits if limit.tokens < run.longest
    ]
    longest = None if is_known_code else Limit(run.longest, "longest row", "position")
    for length, limit in [*wanted, (run.longest, longest)]:
        allowed = run.optional_tokens if limit is None else run.needed_tokens
        together = sorted({*marks, length})
        if length <= most and (length <= FREE_TOKENS or _cost(together, run.num_ways) <= allowed):
            marks = together
        elif limit is not None:
            unreached.append(limit)
    long = _long_rows(short, marks)
    num_tokens = count_forest_tokens([*short, *long])
    is_limited = not is_known_code or any(num_tokens <= limit.tokens < run.chunk_tokens for limit in limits)
    left = (run.needed_tokens if is_limited else run.optional_tokens) - _cost(marks, run.num_ways)
    missing = max(0, run.chunk_tokens - num_tokens)
    filler = _filler(short, max(0, min(missing, left // run.num_ways)), most)
    num_tokens = count_forest_tokens([*filler, *short, *long])
    return CheckRows(short, long, filler, min(num_tokens, run.chunk_tokens), unreached)


def _cost(marks: Sequence[int], num_ways: int) -> int:
    """Tokens that long rows run: each by itself, and all of them as prefixes of the longest in each way."""
    return sum(marks) + num_ways * max(marks, default=0)


def short_rows(vocab_size: int, longest: int) -> list[Completion]:
    """A few random completions: shared prompts, a shared start of the answer, a tree of its own. The first
    two have their prompt and 4 tokens in common.
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, 4096 * 4).astype(np.uint32)
    prompt, answer, other, rest = ids[:20], ids[20:32], ids[40:49], ids[100:]
    completions = [
        Completion(prompt, answer),
        Completion(prompt, np.concatenate([answer[:4], other])),
        Completion(prompt[:9], rest[:15]),
        Completion(prompt[:15], np.concatenate([prompt[15:], answer[:2]])),
        Completion(rest[:3], rest[50:51]),
    ]
    # the same cut for all, so that shared prefixes stay shared
    room = max(1, longest - max(completion.num_tokens for completion in completions))
    return [
        Completion(
            completion.prompt_ids[-room:],
            completion.completion_ids[: longest - min(room, len(completion.prompt_ids))],
        )
        for completion in completions
    ]


def _long_rows(short: Sequence[Completion], marks: Sequence[int]) -> list[Completion]:
    """Rows of these lengths, which are prefixes of one sequence of the tokens of the short rows."""
    known = np.unique(np.concatenate([completion.sequence_ids for completion in short]))
    sequence = np.random.default_rng(1).choice(known, max(marks, default=0))
    starts = [max(1, length - ANSWER_TOKENS) for length in marks]
    return [
        Completion(sequence[:start], sequence[start:length])
        for start, length in zip(starts, marks, strict=True)
        if length > 1
    ]


def _filler(short: Sequence[Completion], num_tokens: int, most_length: int) -> list[Completion]:
    """Rows that sort before the others, with one token to score each; so many tokens as a forest, in which
    they share their first one.
    """
    known = np.unique(np.concatenate([completion.sequence_ids for completion in short]))
    generator = np.random.default_rng(2)
    rows: list[Completion] = []
    while num_tokens > 0 and most_length > 3:
        length = min(most_length, num_tokens + bool(rows))
        sequence = generator.choice(known, max(4, length)).astype(np.uint32)
        turn, place = divmod(len(rows) % len(known) ** 2, len(known))
        sequence[:3] = 0, known[place], known[turn]
        rows.append(Completion(sequence[:-1], sequence[-1:]))
        num_tokens -= len(sequence) - (len(rows) > 1)
    return rows
