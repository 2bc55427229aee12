"""A forest's attention in one call per layer: torch's kernels for sequences of various lengths.

Each segment is a sequence: its queries are its tokens, its keys those of its whole path, gathered into one
row. Such a kernel masks causally, the last query sees the last key, which is what a segment needs. A layer
then takes two copies and one call, whatever the number of segments.

    16 bits    FlashAttention (`aten._flash_attention_forward`), which takes grouped heads
    float32    memory-efficient attention (`aten._efficient_attention_forward`), also for heads that
               FlashAttention does not take; it has as many key heads as query heads

N tokens of the row, P gathered keys, S sequences; H query heads, K key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dpo_cache.lm.device import autocast_dtype, planning_device_type, to_device
from dpo_cache.lm.forest.attention import Rules, attend_segment
from dpo_cache.lm.forest.kernels import FLASH_HEAD_SIZE
from dpo_cache.lm.forest.segments import Segment, last_at_each_depth
from dpo_cache.lm.memory.recompute_later import recompute_later

CAUSAL_FROM_THE_END = 2  # number of the mask in memory-efficient attention


@dataclass(frozen=True, eq=False)
class Layout:
    """Sequences of queries, and which keys each of them has."""

    query_ends: np.ndarray  # [S + 1], the first is 0
    key_ends: np.ndarray  # [S + 1], the first is 0
    keys_P: np.ndarray  # index of each key: of the carried path, then of the row

    @property
    def num_sequences(self) -> int:
        return len(self.query_ends) - 1

    @property
    def most_queries(self) -> int:
        return int(np.diff(self.query_ends).max(initial=1))

    @property
    def most_keys(self) -> int:
        return int(np.diff(self.key_ends).max(initial=1))


def lay_out(segments: Sequence[Segment], rules: Rules) -> Layout:
    """The sequences of these segments, under the rules of a layer.

    Keys before the first that the first query of a sequence sees are left out. Where a layer has chunks, a
    segment is cut at their bounds: all queries of a sequence then see its first key. A window is left to the
    kernel.
    """
    path_length = segments[0].depth
    depth = max(segment.end_depth for segment in segments)
    open_path = np.arange(depth)  # index of the key at each depth
    lengths, keys = [], []
    for segment in segments:
        open_path[segment.depth : segment.end_depth] = path_length + np.arange(segment.start, segment.end)
        for first, end in pairwise(_cuts(segment, rules.chunk)):
            lengths.append(end - first)
            keys.append(open_path[int(rules.first_visible(first)) : end].copy())
    return Layout(
        np.cumsum([0, *lengths]), np.cumsum([0, *map(len, keys)]), np.concatenate(keys).astype(np.int64)
    )


def _cuts(segment: Segment, chunk: int | None) -> list[int]:
    """The depths at which the sequences of a segment begin, and its end."""
    inner = [] if chunk is None else range((segment.depth // chunk + 1) * chunk, segment.end_depth, chunk)
    return [segment.depth, *inner, segment.end_depth]


@dataclass
class VarlenPlan:
    """Plan of a row of segments: a whole forest or, with `paths`, one chunk of a stream.

    `paths` holds the keys and values of the open path by layer, which the chunks of a stream share;
    `max_depth` is its length.
    """

    segments: Sequence[Segment]
    device: torch.device
    paths: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    max_depth: int = 0
    _sequences: dict[Any, Sequences] = field(default_factory=dict)
    _last: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(
        self,
        layer: int,
        query_BHNE: torch.Tensor,
        key_BKNE: torch.Tensor,
        value_BKNE: torch.Tensor,
        rules: Rules,
    ) -> torch.Tensor:
        """Attention output [B, N, H, E]."""
        if not rules.is_fused:
            raise NotImplementedError("kernels for sequences have no soft caps and no attention sinks")
        dtype = autocast_dtype(self.device) or value_BKNE.dtype
        query, key, value = (
            tensor[0].transpose(0, 1).to(dtype) for tensor in (query_BHNE, key_BKNE, value_BKNE)
        )
        if self.paths is not None:
            key, value = self._with_path(layer, self.paths, key, value)
        sequences = self._sequences_of(rules)
        return sequences.attend(query, sequences.gather(key), sequences.gather(value), rules)[None]

    def _sequences_of(self, rules: Rules) -> Sequences:
        if rules.reach not in self._sequences:
            path_length = 0 if self.paths is None else self.segments[0].depth
            num_keys = path_length + self.segments[-1].end
            self._sequences[rules.reach] = Sequences(lay_out(self.segments, rules), num_keys, self.device)
        return self._sequences[rules.reach]

    def _with_path(
        self,
        layer: int,
        paths: dict[int, tuple[torch.Tensor, torch.Tensor]],
        key_NKE: torch.Tensor,
        value_NKE: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Keys and values of the carried path and of the row; the path then continues with the row."""
        if layer not in paths:
            paths[layer] = tuple(  # type: ignore[assignment]
                tensor.new_empty(self.max_depth, *tensor.shape[1:]) for tensor in (key_NKE, value_NKE)
            )
        if self._last is None:
            depths = np.concatenate([np.arange(part.depth, part.end_depth) for part in self.segments])
            self._last = tuple(to_device(one, self.device) for one in last_at_each_depth(depths))  # type: ignore[assignment]
        assert self._last is not None
        depths_L, places_L = self._last
        joined = []
        for path, own in zip(paths[layer], (key_NKE, value_NKE), strict=True):
            joined.append(torch.cat([path[: self.segments[0].depth], own]))
            path[depths_L] = own[places_L]
        return joined


class Sequences:
    """A layout on a device."""

    def __init__(self, layout: Layout, num_keys: int, device: torch.device):
        self.layout = layout
        self._masks: dict[Any, torch.Tensor] = {}
        self._keys_P = to_device(layout.keys_P, device)
        # where each key went, sorted by key, for the sum of its gradients
        uses = np.bincount(layout.keys_P, minlength=num_keys)
        self._uses_P = to_device(np.argsort(layout.keys_P, kind="stable"), device)
        self._first_uses = to_device(np.cumsum(uses) - uses, device)
        self._query_ends = to_device(layout.query_ends.astype(np.int32), device)
        self._key_ends = to_device(layout.key_ends.astype(np.int32), device)
        # kernels treat one query in their own way
        self._most = max(2, layout.most_queries), max(2, layout.most_keys)

    def gather(self, tensor_NKE: torch.Tensor) -> torch.Tensor:
        """Keys or values [P, K, E] of all sequences; within `recording` the copy is not kept."""
        return recompute_later(
            lambda tensor: _Gather.apply(tensor, self._keys_P, self._uses_P, self._first_uses), tensor_NKE
        )

    def attend(
        self, query_NHE: torch.Tensor, keys_PKE: torch.Tensor, values_PKE: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        """Attention output [N, H, E]."""
        if planning_device_type(query_NHE.device) != "cuda":
            return self._one_by_one(query_NHE, keys_PKE, values_PKE, rules)
        ends, sizes = (self._query_ends, self._key_ends), self._most
        window = rules.window if rules.window is not None and rules.window < self.layout.most_keys else None
        if _fits_flash(query_NHE, values_PKE):
            limits = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
            return torch.ops.aten._flash_attention_forward(
                query_NHE,
                keys_PKE,
                values_PKE,
                *ends,
                *sizes,
                0.0,
                True,
                False,
                scale=rules.scaling,
                **limits,
            )[0]
        groups = query_NHE.shape[1] // keys_PKE.shape[1]
        if groups > 1:
            keys_PKE, values_PKE = (one.repeat_interleave(groups, dim=1) for one in (keys_PKE, values_PKE))
        return torch.ops.aten._efficient_attention_forward(
            query_NHE[None],
            keys_PKE[None],
            values_PKE[None],
            None,
            *ends,
            *sizes,
            0.0,
            CAUSAL_FROM_THE_END,
            torch.is_grad_enabled(),
            scale=rules.scaling,
            window_size=window,
        )[0][0]

    def _one_by_one(
        self, query_NHE: torch.Tensor, keys_PKE: torch.Tensor, values_PKE: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        """The same in one call per sequence: for tests on a device without these kernels."""
        rule = Rules(rules.scaling, rules.window)
        queries = query_NHE.split(np.diff(self.layout.query_ends).tolist())
        lengths = np.diff(self.layout.key_ends).tolist()
        parts = []
        for query, keys, values in zip(
            queries, keys_PKE.split(lengths), values_PKE.split(lengths), strict=True
        ):
            query, keys, values = (one.transpose(0, 1)[None] for one in (query, keys, values))
            parts.append(attend_segment(query, keys, values, rule, self._masks)[0].transpose(0, 1))
        return torch.cat(parts)


def _fits_flash(query_NHE: torch.Tensor, values_PKE: torch.Tensor) -> bool:
    size = query_NHE.shape[-1]
    return (
        query_NHE.dtype in (torch.bfloat16, torch.float16)
        and size == values_PKE.shape[-1]
        and size % 8 == 0
        and size <= FLASH_HEAD_SIZE
    )


class _Gather(torch.autograd.Function):
    """`tensor.index_select(0, keys)`, whose backward pass adds up in float32 and in one order.

    torch's own adds with atomic operations, in 16 bits and in any order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor_NKE: torch.Tensor,
        keys_P: torch.Tensor,
        uses_P: torch.Tensor,
        first_uses_N: torch.Tensor,
    ) -> torch.Tensor:
        ctx.uses, ctx.shape = (uses_P, first_uses_N), tensor_NKE.shape
        return tensor_NKE.index_select(0, keys_P)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        uses_P, first_uses_N = ctx.uses
        summed = F.embedding_bag(uses_P, grads[0].flatten(1), first_uses_N, mode="sum")
        return summed.view(ctx.shape), None, None, None
