"""The token forest: completions that share prefixes, laid out so that each distinct prefix occurs once.

Sorted, the sequences are a trie read depth-first. Each adds one segment: its
tokens that are not on the open path yet. The segments, one after the other, are the forest:

    completions             "A B | C D", "A B | C E", "A F | G"       (| ends the prompt)
    tokens                   A  B  C  D  E  F  G
    depths                   0  1  2  3  3  1  2      position ids
    parents                 -1  0  1  2  2  0  5      the token that predicts this one
    starts                   0           4  5         first tokens of the segments
    targets                  [2, 3], [2, 4], [6]      indices of the tokens of each completion

Pure numpy; suffixes name dimensions: L tokens in the forest, T tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from dpo_cache.types import Completion

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Forest:
    """One flat row of tokens; see the module's docstring for an example."""

    tokens_L: np.ndarray
    depths_L: np.ndarray
    parents_L: np.ndarray
    starts: np.ndarray
    targets: list[np.ndarray]  # each [T], in the order of the completions

    def __len__(self) -> int:
        return len(self.tokens_L)

    def is_target_L(self) -> np.ndarray:
        """A mask of the tokens of completions, which need a log-prob: bool [L]."""
        flags = np.zeros(len(self), bool)
        flags[concat_int64(self.targets)] = True
        return flags

    def uses_L(self) -> np.ndarray:
        """How many completions have each token, in the prompt or in the answer: int64 [L]."""
        uses = np.zeros(len(self), np.int64)
        np.add.at(uses, [target[-1] for target in self.targets], 1)
        # backwards: the segments that continue a segment come after it
        for start, end in zip(self.starts[::-1], [len(self), *self.starts[:0:-1]], strict=True):
            uses[start:end] = uses[start:end][::-1].cumsum()[::-1]
            if self.parents_L[start] >= 0:
                uses[self.parents_L[start]] += uses[start]
        return uses


def build_forest(completions: Sequence[Completion]) -> Forest:
    """Lay out the completions, each distinct prefix once."""
    order, shared_lengths = sort_completions(completions)
    # the index of the token at each depth of the open path
    open_path = np.empty(max((len(completion) for completion in completions), default=0), np.int64)
    tokens, depths, parents, starts = [], [], [], []
    targets: list[np.ndarray] = [np.empty(0, np.int64)] * len(completions)
    length = 0
    for index, shared in zip(order, shared_lengths.tolist(), strict=True):
        sequence = completions[index].sequence_ids
        num_new = len(sequence) - shared
        if num_new:
            starts.append(length)
            tokens.append(sequence[shared:])
            depths.append(np.arange(shared, len(sequence)))
            parents.append(np.arange(length - 1, length + num_new - 1))
            parents[-1][0] = open_path[shared - 1] if shared else -1
            open_path[shared : len(sequence)] = np.arange(length, length + num_new)
            length += num_new
        targets[index] = open_path[len(completions[index].prompt_ids) : len(sequence)].copy()
    return Forest(
        concat_int64(tokens), concat_int64(depths), concat_int64(parents), np.array(starts, np.int64), targets
    )


def count_forest_tokens(completions: Sequence[Completion]) -> int:
    """Tokens of `build_forest(completions)`, without building it."""
    _, shared = sort_completions(completions)
    return sum(map(len, completions)) - int(shared.sum())


def split_by_tokens(completions: Sequence[Completion], most_tokens: int) -> list[Sequence[Completion]]:
    """The completions, in their order, in parts whose forests have at most so many tokens; a completion that
    has more is a part by itself.
    """
    parts: list[Sequence[Completion]] = []
    start = 0
    for end in range(1, len(completions) + 1):
        if end - start > 1 and count_forest_tokens(completions[start:end]) > most_tokens:
            parts.append(completions[start : end - 1])
            start = end - 1
    return [*parts, completions[start:]]


def group_by_tokens(
    items: Iterable[Item], budget_tokens: int, count_tokens: Callable[[list[Item]], int]
) -> list[tuple[list[Item], int]]:
    """The items, in their order, in groups of at most so many tokens, each with its number of tokens; an item
    that has more is a group by itself.
    """
    groups: list[tuple[list[Item], int]] = []
    for item in items:
        if groups:
            together = [*groups[-1][0], item]
            num_tokens = count_tokens(together)
            if num_tokens <= budget_tokens:
                groups[-1] = together, num_tokens
                continue
        groups.append(([item], count_tokens([item])))
    return groups


def sort_completions(completions: Sequence[Completion]) -> tuple[list[int], np.ndarray]:
    """The order in which neighbours share their longest prefixes, and how many tokens each shares with the
    one before it.
    """
    keys = [
        completion.prompt_ids.astype(">u4").tobytes() + completion.completion_ids.astype(">u4").tobytes()
        for completion in completions
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shared = np.zeros(len(keys), np.int64)
    for place, neighbours in enumerate(pairwise(order), 1):
        shared[place] = shared_prefix(*(np.frombuffer(keys[index], np.uint32) for index in neighbours))
    return order, shared


def shared_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many leading tokens two sequences have in common."""
    shortest = min(len(one), len(other))
    differs = one[:shortest] != other[:shortest]
    return int(differs.argmax()) if differs.any() else shortest


def concat_int64(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.empty(0, np.int64)
