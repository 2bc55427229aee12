"""Sorted completions as one stream of tokens, cut into chunks.

The stream is the forest of all completions (see `forest.py`), read token by token. Nothing of its length is
held but one flag a token: a chunk is laid out when its turn comes, from the completions it touches.

Pure numpy; suffixes name dimensions: C tokens of a chunk, T of them that need a log-prob.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dpo_cache.lm.forest.layout import sort_completions
from dpo_cache.types import Completion


@dataclass(frozen=True)
class Piece:
    """Tokens [start, end) of a chunk that one completion adds; the first has `depth` tokens before it on its
    path.
    """

    start: int
    end: int
    depth: int
    ends: int | None  # position of the completion, if this is its last piece


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of the stream."""

    tokens_C: np.ndarray
    depths_C: np.ndarray
    pieces: list[Piece]
    targets_T: np.ndarray  # which tokens need a log-prob, by place in the chunk
    # what predicts each: a place in the chunk, or -1 - depth of a token carried on the open path
    predictors_T: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_C)


@dataclass(eq=False)
class Stream:
    """The completions in their order; iterate with `chunks`."""

    completions: Sequence[Completion]
    order: list[int] = field(init=False)
    # tokens that each completion, in this order, finds on the open path
    shared: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.order, self.shared = sort_completions(self.completions)
        self.lengths = np.array([len(self.completions[index]) for index in self.order], np.int64)
        self._is_target = self._find_targets()

    def __len__(self) -> int:
        """Tokens of the stream."""
        return int(self.lengths.sum() - self.shared.sum())

    @property
    def max_depth(self) -> int:
        """Length of the longest path, in tokens."""
        return int(self.lengths.max(initial=0))

    def chunks(self, next_size: Callable[[], int]) -> Iterator[Chunk]:
        """The stream in chunks of the size that `next_size` says before each, the last one smaller."""
        builder = _ChunkBuilder(self.max_depth)
        size = next_size()
        offsets = np.cumsum(self.lengths - self.shared)
        for place, index in enumerate(self.order):
            completion, depth = self.completions[index], int(self.shared[place])
            ids = completion.sequence_ids
            flags = self._is_target[int(offsets[place]) - (len(ids) - depth) : int(offsets[place])]
            taken = 0
            while True:
                room = size - builder.num_tokens
                part = slice(taken, min(taken + room, len(flags)))
                is_last = part.stop == len(flags)
                builder.add(
                    ids[depth + part.start : depth + part.stop],
                    flags[part],
                    depth + part.start,
                    index if is_last else None,
                )
                taken = part.stop
                if builder.num_tokens == size:
                    yield builder.finish()
                    size = next_size()
                if is_last:
                    break
        if builder.pieces:
            yield builder.finish()

    def _find_targets(self) -> np.ndarray:
        """Which tokens of the stream are part of a completion: bool [len(self)].

        A token can be prompt to the completion that brought it and answer to a later one that shares it, so
        the completions are walked backwards with the least prompt length of those that share each depth.
        """
        flags: list[np.ndarray] = []
        least_prompt = np.zeros(self.max_depth, np.int64)
        next_shared = 0
        for place in range(len(self.order) - 1, -1, -1):
            length, shared = int(self.lengths[place]), int(self.shared[place])
            prompt_length = len(self.completions[self.order[place]].prompt_ids)
            least_prompt[next_shared:length] = prompt_length
            np.minimum(least_prompt[:next_shared], prompt_length, out=least_prompt[:next_shared])
            flags.append(least_prompt[shared:length] <= np.arange(shared, length))
            next_shared = shared
        return np.concatenate(flags[::-1]) if flags else np.zeros(0, bool)


class _ChunkBuilder:
    """Gathers pieces into a chunk; knows what stands at each depth of the open path."""

    def __init__(self, max_depth: int):
        self.num_tokens = 0
        # place in the chunk, or -1 - depth: carried from an earlier one
        self._place_at = -1 - np.arange(max_depth)
        self._reset()

    def add(self, ids: np.ndarray, flags: np.ndarray, depth: int, ends: int | None) -> None:
        start: int = self.num_tokens
        end = start + len(ids)
        predictors = np.arange(start - 1, end - 1)
        if len(ids):
            # the first token of a sequence is never a target
            predictors[0] = self._place_at[depth - 1] if depth else -1
            self._place_at[depth : depth + len(ids)] = np.arange(start, end)
        targets = np.flatnonzero(flags)
        self._tokens.append(ids)
        self._depths.append(np.arange(depth, depth + len(ids)))
        self._targets.append(start + targets)
        self._predictors.append(predictors[targets])
        self.pieces.append(Piece(start, end, depth, ends))
        self.num_tokens = end

    def finish(self) -> Chunk:
        chunk = Chunk(
            _flat(self._tokens),
            _flat(self._depths),
            self.pieces,
            _flat(self._targets),
            _flat(self._predictors),
        )
        self._place_at[:] = -1 - np.arange(len(self._place_at))
        self._reset()
        return chunk

    def _reset(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._depths: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []
        self._predictors: list[np.ndarray] = []
        self.pieces: list[Piece] = []
        self.num_tokens = 0


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
