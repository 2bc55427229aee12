"""A forest's attention as one FlexAttention call per layer, under a block mask; takes every rule of a layer.

The keys are those of the carried path, padded to whole mask blocks, if there is one, then the row's own. A
query sees

    path token at depth d    if d < entry[q], the length of the carried path that the query continues
    own token k              if k <= q < end[k], the end of the subtree of token k

and of these the ones that a window or a chunk leaves. For each block of queries and keys the plan finds from
the least and largest of these numbers whether all pairs are visible, or none; only in the other blocks does
the kernel apply the mask function.

N tokens of the row, P of the padded path; H query heads, K key heads, E head size; Q blocks of queries, J of
keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from dpo_cache.lm.device import autocast_dtype, to_device
from dpo_cache.lm.forest.attention import Rules
from dpo_cache.lm.forest.flex_call import FlexCall
from dpo_cache.lm.forest.segments import Segment, last_at_each_depth

MASK_BLOCK = 128


@dataclass
class FlexPlan:
    """Plan of a row of segments: a whole forest or, with `paths`, one chunk of a stream.

    `paths` holds the keys and values of the open path by layer, which the chunks of a stream share;
    `max_depth` is its length.
    """

    segments: Sequence[Segment]
    device: torch.device
    paths: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    max_depth: int = 0
    _masks: dict[Any, BlockMask] = field(default_factory=dict)
    _calls: dict[Any, FlexCall] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path_length = -(-self.segments[0].depth // MASK_BLOCK) * MASK_BLOCK
        self._spans = tree_spans(self.segments)
        # a tensor, for it is another number in each chunk, and the kernel is compiled once
        self._path_length = to_device(torch.tensor(self.path_length), self.device)
        self._entry_N, self._end_N, self._depth_N = (to_device(one, self.device) for one in self._spans)
        if self.paths is not None:
            last = last_at_each_depth(self._spans[2])
            self._last_depths, self._last_places = (to_device(one, self.device) for one in last)

    def attend(
        self,
        layer: int,
        query_BHNE: torch.Tensor,
        key_BKNE: torch.Tensor,
        value_BKNE: torch.Tensor,
        rules: Rules,
    ) -> torch.Tensor:
        """Attention output [B, N, H, E]."""
        dtype = autocast_dtype(self.device) or value_BKNE.dtype
        query, key, value = (tensor.to(dtype) for tensor in (query_BHNE, key_BKNE, value_BKNE))
        if self.paths is not None:
            key, value = self._with_path(layer, self.paths, key, value)
        return self._call(rules)(query, key, value, rules.sinks_H).transpose(1, 2)

    def _with_path(
        self,
        layer: int,
        paths: dict[int, tuple[torch.Tensor, torch.Tensor]],
        key_BKNE: torch.Tensor,
        value_BKNE: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Keys and values of the carried path and of the row; the path then continues with the row."""
        if layer not in paths:
            size = -(-self.max_depth // MASK_BLOCK) * MASK_BLOCK
            paths[layer] = tuple(  # type: ignore[assignment]
                tensor.new_zeros(1, tensor.shape[1], size, tensor.shape[3])
                for tensor in (key_BKNE, value_BKNE)
            )
        joined = []
        for path, own in zip(paths[layer], (key_BKNE, value_BKNE), strict=True):
            joined.append(torch.cat([path[:, :, : self.path_length], own], dim=2))
            path[:, :, self._last_depths] = own[:, :, self._last_places]
        return joined

    def _call(self, rules: Rules) -> FlexCall:
        name = (rules.reach, rules.softcap, rules.scaling)
        if name not in self._calls:
            if rules.reach not in self._masks:
                self._masks[rules.reach] = self._mask(rules)
            self._calls[name] = FlexCall(self._masks[rules.reach], rules.scaling, rules.softcap)
        return self._calls[name]

    def _mask(self, rules: Rules) -> BlockMask:
        is_seen_QJ, is_whole_QJ = visible_blocks(self._spans, self.path_length, rules)
        partial = _first_true(is_seen_QJ & ~is_whole_QJ)
        blocks = (*partial, *_first_true(is_whole_QJ))
        num_partial, partial_keys, num_whole, whole_keys = (
            to_device(one[None, None], self.device) for one in blocks
        )
        num_queries = len(self._spans[0])
        return BlockMask.from_kv_blocks(
            num_partial,
            partial_keys,
            num_whole,
            whole_keys,
            BLOCK_SIZE=MASK_BLOCK,
            mask_mod=self.visible(rules),
            seq_lengths=(num_queries, self.path_length + num_queries),
        )

    def visible(self, rules: Rules) -> Callable[..., torch.Tensor]:
        """The mask function: whether a query of the row sees a key of path and row."""
        entry_N, end_N, depth_N = self._entry_N, self._end_N, self._depth_N
        has_path, path_length = self.path_length > 0, self._path_length
        # text is a constant to the compiler; a number that is a symbol is one more input of the kernel
        window, chunk = (None if limit is None else str(limit) for limit in rules.reach)

        def is_visible(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (key - path_length).clamp(min=0) if has_path else key
            seen, key_depth = (own <= query) & (query < end_N[own]), depth_N[own]
            if has_path:
                on_path = key < path_length
                seen = torch.where(on_path, key < entry_N[query], seen)
                key_depth = torch.where(on_path, key, key_depth)
            if window is not None:
                seen = seen & (key_depth > depth_N[query] - int(window))
            if chunk is not None:
                seen = seen & (key_depth >= depth_N[query] // int(chunk) * int(chunk))
            return seen

        return is_visible


def tree_spans(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token of the row the number of carried path tokens that it sees, the end of its subtree and
    its depth: int64 [N] each.
    """
    length = segments[-1].end
    entry_N, end_N, depth_N = np.zeros(length, np.int64), np.full(length, length), np.zeros(length, np.int64)
    open_path = np.zeros(0, np.int64)  # the row's tokens on the open path
    for segment in segments:
        first_depth = int(depth_N[open_path[0]]) if len(open_path) else segment.depth
        keep = max(0, segment.depth - first_depth)
        end_N[open_path[keep:]] = segment.start
        open_path = np.concatenate([open_path[:keep], np.arange(segment.start, segment.end)])
        entry_N[segment.start : segment.end] = first_depth if keep else segment.depth
        depth_N[segment.start : segment.end] = np.arange(segment.depth, segment.end_depth)
    return entry_N, end_N, depth_N


def visible_blocks(
    spans: tuple[np.ndarray, np.ndarray, np.ndarray], path_length: int, rules: Rules
) -> tuple[np.ndarray, np.ndarray]:
    """For blocks of queries and keys, whether a query may see a key, and whether all see all: bool [Q, J].

    Some blocks in which no pair is visible count as seen, and some in which all pairs are count as not whole:
    there the mask function decides.
    """
    entry_N, end_N, depth_N = spans
    starts = np.arange(0, len(depth_N), MASK_BLOCK)
    ends = np.minimum(starts + MASK_BLOCK, len(depth_N))
    path_starts = np.arange(0, path_length, MASK_BLOCK)
    seen_path = path_starts < _largest(entry_N, starts)[:, None]
    whole_path = path_starts + MASK_BLOCK <= _least(entry_N, starts)[:, None]
    seen_own = (starts <= starts[:, None]) & (_largest(end_N, starts) > starts[:, None])
    whole_own = (starts < starts[:, None]) & (_least(end_N, starts) >= ends[:, None])
    is_seen, is_whole = np.hstack([seen_path, seen_own]), np.hstack([whole_path, whole_own])
    if rules.window is not None or rules.chunk is not None:
        first_N = rules.first_visible(depth_N)  # grows with the depth
        last_key_depth = np.concatenate([path_starts + MASK_BLOCK - 1, _largest(depth_N, starts)])
        first_key_depth = np.concatenate([path_starts, _least(depth_N, starts)])
        is_seen &= last_key_depth >= _least(first_N, starts)[:, None]
        is_whole &= first_key_depth >= _largest(first_N, starts)[:, None]
    return is_seen, is_whole & is_seen


def _least(values_N: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.minimum.reduceat(values_N, starts)


def _largest(values_N: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.maximum.reduceat(values_N, starts)


def _first_true(flags_QJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks of each row are true, and the row's blocks with these first: int32 [Q] and [Q, J]."""
    order = np.argsort(~flags_QJ, axis=1, kind="stable")
    return flags_QJ.sum(axis=1).astype(np.int32), order.astype(np.int32)
