"""Attention of a whole forest on a CPU as one operation, by torch's fused kernels.

    for part in parts:    output[part] = softmax(scaling q[part] k[path].T + mask) v[path]

Between torch's functions each part would be an operation with its own copies of its path's keys and values,
its own output, and gradients of the size of the row. Here a path that is in one piece is a view, outputs are
written where the next product reads them, and the gradients of keys and values are added up in place.

H query heads, K key heads, L row length, N queries of a part, P keys of its path, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from dpo_cache.lm.device import autocast_dtype, planning_device_type


@dataclass(frozen=True)
class Part:
    """Queries [start, end) of the row, and the ranges of the row whose keys they see, under a mask [N, P]."""

    start: int
    end: int
    path: Sequence[tuple[int, int]]
    mask_NP: torch.Tensor | None  # None: each query sees all keys or, if `is_causal`, those up to its own
    is_causal: bool


@cache
def has_kernels() -> bool:
    """Return whether this torch has both kernels, which are internal to it, and they agree with its
    attention.
    """
    with _disable_current_modes(), torch.autocast("cpu", enabled=False):  # on real tensors, not fake ones
        return _agrees()


def can_attend_tree(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether `attend_tree` computes the same here as torch's attention."""
    return (
        planning_device_type(query.device) == "cpu"
        and query.shape[-1] == key.shape[-1] == value.shape[-1]
        and query.shape[1] % key.shape[1] == 0
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and autocast_dtype(query.device) in (None, query.dtype)
    )


def attend_tree(
    query_HLE: torch.Tensor,
    key_KLE: torch.Tensor,
    value_KLE: torch.Tensor,
    parts: Sequence[Part],
    scaling: float,
) -> torch.Tensor:
    """Attention output [1, L, H, E] of [1, H, L, E] and [1, K, L, E]; see the module's docstring."""
    return _TreeAttention.apply(query_HLE, key_KLE, value_KLE, parts, scaling)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        parts: Sequence[Part],
        scaling: float,
    ) -> torch.Tensor:
        _, num_heads, length, size = query.shape
        output = query.new_empty(1, length, num_heads, size)
        log_sums = []
        for part in parts:
            found, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, part.start : part.end],
                _gather(key, part.path),
                _gather(value, part.path),
                0.0,
                part.is_causal,
                attn_mask=part.mask_NP,
                scale=scaling,
            )
            output[:, part.start : part.end] = found.transpose(1, 2)
            log_sums.append(log_sum)
        ctx.parts, ctx.scaling = parts, scaling
        ctx.save_for_backward(query, key, value, output, *log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, *log_sums = ctx.saved_tensors
        grad, output = grads[0].transpose(1, 2), output.transpose(1, 2)
        grad_query, grad_key, grad_value = (
            torch.empty_like(query),
            torch.zeros_like(key),
            torch.zeros_like(value),
        )
        for part, log_sum in zip(ctx.parts, log_sums, strict=True):
            here = slice(part.start, part.end)
            for_query, for_key, for_value = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad[:, :, here],
                    query[:, :, here],
                    _gather(key, part.path),
                    _gather(value, part.path),
                    output[:, :, here],
                    log_sum,
                    0.0,
                    part.is_causal,
                    attn_mask=part.mask_NP,
                    scale=ctx.scaling,
                )
            )
            grad_query[:, :, here] = for_query
            _scatter_add(grad_key, for_key, part.path)
            _scatter_add(grad_value, for_value, part.path)
        return grad_query, grad_key, grad_value, None, None


def _gather(tensor: torch.Tensor, path: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The keys or values of a path; a view if it is in one piece."""
    pieces = [tensor[:, :, start:end] for start, end in path]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _scatter_add(total: torch.Tensor, grad: torch.Tensor, path: Sequence[tuple[int, int]]) -> None:
    place = 0
    for start, end in path:
        total[:, :, start:end] += grad[:, :, place : place + end - start]
        place += end - start


def _agrees() -> bool:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 6, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)
    )
    mask_NP = torch.full((4, 6), float("-inf")).triu(3)
    parts = [Part(0, 2, [(0, 2)], None, True), Part(2, 6, [(0, 2), (2, 6)], mask_NP, False)]
    with torch.enable_grad():
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.5, enable_gqa=True
        ).transpose(1, 2)
        outward = torch.randn(expected.shape, generator=generator)
        try:
            found = attend_tree(query, key, value, parts, 0.5)
            grads = [
                torch.autograd.grad(output, [query, key, value], outward) for output in (found, expected)
            ]
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            return False
    return torch.allclose(found, expected, atol=1e-5) and all(
        torch.allclose(one, other, atol=1e-4) for one, other in zip(*grads, strict=True)
    )
