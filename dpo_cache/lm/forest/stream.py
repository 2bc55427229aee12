"""Sorted completions as one stream of tokens, cut into chunks.

The stream is the forest of all completions (see `layout.py`), read token by token. Only one flag per token is
kept for its whole length; a chunk is laid out when it is needed, from the completions it touches.

Pure numpy; suffixes name dimensions: C tokens of a chunk, T of them that need a log-prob.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cache.lm.forest.layout import concat_int64, sort_completions
from dpo_cache.lm.forest.segments import Segment
from dpo_cache.types import Completion


@dataclass(frozen=True)
class Piece(Segment):
    """Tokens of a chunk that one completion adds; there may be none."""

    ends: int | None  # position of the completion, if this is its last piece


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of the stream."""

    tokens_C: np.ndarray
    depths_C: np.ndarray
    pieces: list[Piece]
    targets_T: np.ndarray  # indices in the chunk of the tokens that need a log-prob
    # the token that predicts each: an index in the chunk, or -1 - depth of a token carried on the open path
    predictors_T: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_C)


class Stream:
    """The completions in sorted order; iterate with `chunks`."""

    def __init__(self, completions: Sequence[Completion]):
        self.completions = completions
        # how many tokens each completion, in this order, shares with the one before it
        self.order, self.shared = sort_completions(completions)
        self.lengths = np.array([len(completions[index]) for index in self.order], np.int64)

    def __len__(self) -> int:
        """Tokens of the stream."""
        return int(self.lengths.sum() - self.shared.sum())

    @property
    def max_depth(self) -> int:
        """Length of the longest path, in tokens."""
        return int(self.lengths.max(initial=0))

    def chunks(self, next_size: Callable[[], int]) -> Iterator[Chunk]:
        """The stream in chunks; `next_size` is called before each for its size. The last one is smaller."""
        builder, size = _ChunkBuilder(self.max_depth), next_size()
        for index, depth, is_target in zip(self.order, self.shared.tolist(), self._targets(), strict=True):
            ids, is_last = self.completions[index].sequence_ids[depth:], False
            while not is_last:
                room = size - builder.num_tokens
                is_last = len(ids) <= room
                builder.add(ids[:room], is_target[:room], depth, index if is_last else None)
                ids, is_target, depth = ids[room:], is_target[room:], depth + room
                if builder.num_tokens == size:
                    yield builder.build()
                    builder, size = _ChunkBuilder(self.max_depth), next_size()
        if builder.pieces:
            yield builder.build()

    def _targets(self) -> list[np.ndarray]:
        """For each completion in order, which of the tokens it adds are part of an answer: bool arrays.

        A token can be part of the prompt of the completion that adds it and of the answer of a later one that
        shares it, so the completions are walked backwards with the least prompt length of those that share
        each depth.
        """
        flags: list[np.ndarray] = []
        least_prompt = np.zeros(self.max_depth, np.int64)
        next_shared = 0
        for index, length, shared in zip(
            self.order[::-1], self.lengths[::-1].tolist(), self.shared[::-1].tolist(), strict=True
        ):
            prompt_length = len(self.completions[index].prompt_ids)
            least_prompt[next_shared:length] = prompt_length
            np.minimum(least_prompt[:next_shared], prompt_length, out=least_prompt[:next_shared])
            flags.append(least_prompt[shared:length] <= np.arange(shared, length))
            next_shared = shared
        return flags[::-1]


class _ChunkBuilder:
    """Gathers pieces into a chunk; knows which token is at each depth of the open path."""

    def __init__(self, max_depth: int):
        # an index in the chunk, or -1 - depth: carried from an earlier one
        self._index_at = -1 - np.arange(max_depth)
        self._tokens: list[np.ndarray] = []
        self._is_target: list[np.ndarray] = []
        self._predictors: list[np.ndarray] = []
        self.pieces: list[Piece] = []
        self.num_tokens = 0

    def add(self, ids: np.ndarray, is_target: np.ndarray, depth: int, ends: int | None) -> None:
        piece = Piece(self.num_tokens, self.num_tokens + len(ids), depth, ends)
        indices = np.arange(piece.start, piece.end)
        self._tokens.append(ids)
        self._is_target.append(is_target)
        self._predictors.append(indices - 1)
        if len(ids):
            # the first token of a sequence is never a target
            self._predictors[-1][0] = self._index_at[depth - 1] if depth else -1
            self._index_at[depth : piece.end_depth] = indices
        self.pieces.append(piece)
        self.num_tokens = piece.end

    def build(self) -> Chunk:
        depths_C = concat_int64([np.arange(piece.depth, piece.end_depth) for piece in self.pieces])
        targets_T = np.flatnonzero(np.concatenate(self._is_target))
        predictors_T = concat_int64(self._predictors)[targets_T]
        return Chunk(concat_int64(self._tokens), depths_C, self.pieces, targets_T, predictors_T)
