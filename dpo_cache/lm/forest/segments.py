"""Segments of a token forest, and the blocks of neighbouring segments that attention computes in one call.

Pure numpy. N tokens of a block, P keys: the path of the block's first segment, then the block itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpo_cache.lm.forest.layout import Forest

# Longest part of a segment in one call: the causal mask hides half of the scores of a part with itself.
QUERY_TOKENS = 128

# The cost of one more call of the attention kernel, in pairs of a query and a key that could be computed
# meanwhile.
CALL_COST = 4000


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the row; the first has `depth` tokens before it on its path."""

    start: int
    end: int
    depth: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def end_depth(self) -> int:
        return self.depth + self.length


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring segments in one call. Its keys are the path of the first segment, then its own tokens: the
    paths of later segments add nothing but tokens of the block.
    """

    segments: Sequence[Segment]

    @property
    def path_length(self) -> int:
        return self.segments[0].depth

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def end(self) -> int:
        return self.segments[-1].end

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key, those that the mask hides included."""
        length = self.end - self.start
        return length * (self.path_length + length)

    def depths_N(self) -> np.ndarray:
        """Depth of each token."""
        return np.concatenate([np.arange(segment.depth, segment.end_depth) for segment in self.segments])

    def visible_NP(self) -> np.ndarray:
        """A mask of the keys that each token of the block sees: bool [N, P]."""
        length = self.end - self.start
        visible = np.zeros((length, self.path_length + length), bool)
        path = np.arange(self.path_length)  # the keys on the open path, by depth
        for segment in self.segments:
            rows = np.arange(segment.start, segment.end) - self.start
            path = np.concatenate([path[: segment.depth], self.path_length + rows])
            visible[rows[:, None], path] = np.tri(segment.length, len(path), segment.depth, dtype=bool)
        return visible


def segments_of(forest: Forest) -> list[Segment]:
    """The segments of a forest: what each completion adds to those before it."""
    ends = [*forest.starts.tolist(), len(forest)]
    return [Segment(start, end, int(forest.depths_L[start])) for start, end in pairwise(ends)]


def split_segment(segment: Segment) -> list[Segment]:
    """Parts of at most QUERY_TOKENS, each of which continues the one before it: scores that a part's mask
    would hide are not computed.
    """
    cuts = [*range(segment.start, segment.end, QUERY_TOKENS), segment.end]
    return [Segment(start, end, segment.depth + start - segment.start) for start, end in pairwise(cuts)]


def group_segments(segments: Sequence[Segment]) -> list[Block]:
    """Blocks of neighbouring segments, joined where the scores that a mask hides cost less than another
    call.
    """
    blocks: list[Block] = []
    for part in (part for segment in segments for part in split_segment(segment)):
        single = Block([part])
        joined = Block([*blocks[-1].segments, part]) if blocks else single
        if blocks and joined.num_pairs <= blocks[-1].num_pairs + single.num_pairs + CALL_COST:
            blocks[-1] = joined
        else:
            blocks.append(single)
    return blocks


def last_at_each_depth(depths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The depths that occur, and the index of the last token at each.

    Of several tokens at one depth only the last can be on the open path. Depths beyond the end of that path
    are included; they are overwritten before a later token reads them.
    """
    depths, from_the_end = np.unique(depths_N[::-1], return_index=True)
    return depths, len(depths_N) - 1 - from_the_end
