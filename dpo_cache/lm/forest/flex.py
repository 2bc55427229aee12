"""The plan of `PathPlan` as one FlexAttention block mask, the fastest on a GPU.

The keys of a chunk are the carried path, padded to whole mask blocks, then the chunk's tokens. A query sees

    path token at depth d    if d < entry[q], the length of the carried path that the query continues
    chunk token k            if k <= q < end[k], the end of the subtree of token k

C tokens of a chunk, P of the padded path; H query heads, K key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dpo_cache.lm.forest.attention import Rules
from dpo_cache.lm.forest.segments import Segment, last_at_each_depth

MASK_BLOCK = 128


@dataclass
class FlexPlan:
    """Plan of one chunk of a stream; `paths` is shared by all chunks of the stream."""

    segments: list[Segment]
    max_depth: int
    paths: dict[int, tuple[torch.Tensor, torch.Tensor]]
    device: torch.device
    masks: dict[Any, BlockMask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spans = tree_spans(self.segments)
        self.path_length = -(-self.segments[0].depth // MASK_BLOCK) * MASK_BLOCK
        self.entry_C, self.end_C, self.depth_C, self.last_depths, self.last_places = (
            torch.from_numpy(values).to(self.device, non_blocking=True)
            for values in (*spans, *last_at_each_depth(spans[2]))
        )

    def attend(
        self,
        layer: int,
        query_BHCE: torch.Tensor,
        key_BKCE: torch.Tensor,
        value_BKCE: torch.Tensor,
        rules: Rules,
    ) -> torch.Tensor:
        """Attention output [B, C, H, E]."""
        if rules.sinks_H is not None:
            raise NotImplementedError("attention sinks")
        if layer not in self.paths:
            size = -(-self.max_depth // MASK_BLOCK) * MASK_BLOCK
            self.paths[layer] = tuple(  # type: ignore[assignment]
                tensor.new_zeros(1, tensor.shape[1], size, tensor.shape[3])
                for tensor in (key_BKCE, value_BKCE)
            )
        paths = self.paths[layer]
        keys, values = (
            torch.cat([path[:, :, : self.path_length], own], dim=2)
            for path, own in zip(paths, (key_BKCE, value_BKCE), strict=True)
        )
        output = _kernel(self.device.type)(
            query_BHCE,
            keys,
            values,
            score_mod=None if rules.softcap is None else _softcap(rules.softcap),
            block_mask=self._mask(rules),
            scale=rules.scaling,
            enable_gqa=query_BHCE.shape[1] != key_BKCE.shape[1],
        )
        for path, own in zip(paths, (key_BKCE, value_BKCE), strict=True):
            path[:, :, self.last_depths] = own[:, :, self.last_places]
        return output.transpose(1, 2)

    def _mask(self, rules: Rules) -> BlockMask:
        if rules.reach not in self.masks:
            num_queries = len(self.entry_C)
            self.masks[rules.reach] = create_block_mask(
                self.visible(rules),
                None,
                None,
                num_queries,
                self.path_length + num_queries,
                device=self.device,
                BLOCK_SIZE=MASK_BLOCK,
            )
        return self.masks[rules.reach]

    def visible(self, rules: Rules) -> Callable[..., torch.Tensor]:
        """The mask function: whether a query of the chunk sees a key of path and chunk."""
        entry_C, end_C, depth_C, path_length = self.entry_C, self.end_C, self.depth_C, self.path_length
        window, chunk = rules.reach

        def is_visible(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            own = (key - path_length).clamp(min=0)
            on_path = key < path_length
            seen = torch.where(on_path, key < entry_C[query], (own <= query) & (query < end_C[own]))
            key_depth = torch.where(on_path, key, depth_C[own])
            if window is not None:
                seen = seen & (key_depth > depth_C[query] - window)
            if chunk is not None:
                seen = seen & (key_depth >= depth_C[query] // chunk * chunk)
            return seen

        return is_visible


def tree_spans(segments: list[Segment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token of the chunk the number of carried path tokens that it sees, the end of its subtree and
    its depth: int64 [C] each.
    """
    length = segments[-1].end
    entry_C, end_C, depth_C = np.zeros(length, np.int64), np.full(length, length), np.zeros(length, np.int64)
    open_path: list[int] = []  # the chunk's tokens on the open path
    for segment in segments:
        first_depth = depth_C[open_path[0]] if open_path else segment.depth
        keep = max(0, segment.depth - first_depth)
        end_C[open_path[keep:]] = segment.start
        open_path = [*open_path[:keep], *range(segment.start, segment.end)]
        entry_C[segment.start : segment.end] = first_depth if keep else segment.depth
        depth_C[segment.start : segment.end] = np.arange(segment.depth, segment.end_depth)
    return entry_C, end_C, depth_C


@cache
def _kernel(device_type: str) -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled on a GPU; uncompiled elsewhere, for tests."""
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if device_type == "cuda" else kernel


def _softcap(cap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return capped
