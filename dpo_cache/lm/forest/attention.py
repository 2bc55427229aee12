"""Attention over a token forest, as a function that transformers models call.

Each segment attends to the whole path that it continues, and causally to itself. A plan holds which keys
these are: a `PathPlan` or `FlexPlan` for scoring, a `TreePlan` for training. It is passed to the model call
as the keyword argument `forest_plan`, which the model's code hands down to its attention layers. The plan
calls back `attend_segment` or `attend`, which follow a layer's rules: windows, chunks, soft caps and sinks.

B = 1 rows, H query heads, K key heads, L row length, N queries, P keys, E head size.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_cache.lm.device import planning_device_type, to_device

FOREST_ATTENTION = "dpo_cache_forest"


@dataclass(frozen=True)
class Rules:
    """The additions of a layer to plain causal attention."""

    scaling: float
    window: int | None = None  # a query sees keys less than this many tokens back
    chunk: int | None = None  # length of the chunks of depths; a query sees only keys of its own chunk
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None

    def first_visible(self, depths: Any) -> Any:
        """Depth of the first key that queries at these depths see; an int or a numpy array of them."""
        if self.window is not None:
            return np.maximum(depths - self.window + 1, 0)
        return depths // self.chunk * self.chunk if self.chunk is not None else depths * 0

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Layers with the same reach share their masks."""
        return self.window, self.chunk

    @property
    def is_fused(self) -> bool:
        """Return whether fused kernels can follow these rules."""
        return self.softcap is None and self.sinks_H is None


class PlanLostError(Exception):
    """The model's code drops the keyword argument that carries the plan."""


def use_forest_attention(model: PreTrainedModel) -> bool:
    """Switch the model to forest attention; False where its code does not allow another attention."""
    if not model._can_set_attn_implementation():
        return False
    set_attention(model, FOREST_ATTENTION)
    return model.config._attn_implementation == FOREST_ATTENTION


def set_attention(model: PreTrainedModel, name: str) -> None:
    """`model.set_attn_implementation(name)` without its warnings on the configs of towers without a tower."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_has_its_model)
    try:
        model.set_attn_implementation(name)
    finally:
        logger.removeFilter(_has_its_model)


def _has_its_model(record: logging.LogRecord) -> bool:
    return "without finding the associated sub-model" not in record.getMessage()


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,  # the result of `_chunk_of_mask`: no mask is built
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    forest_plan: Any = None,  # a PathPlan, TreePlan or FlexPlan
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that a transformers model calls in place of its own; output [B, L, H, E]."""
    if forest_plan is None:
        raise PlanLostError
    assert dropout == 0.0, "the forest shares prefixes, which dropout forbids"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = Rules(scaling, sliding_window, attention_mask, softcap, s_aux)
    return forest_plan.attend(id(module), query, key, value, rules), None


def attend_segment(
    query_BHNE: torch.Tensor,
    key_BKPE: torch.Tensor,
    value_BKPE: torch.Tensor,
    rules: Rules,
    masks: dict[Any, torch.Tensor],
) -> torch.Tensor:
    """Attention [B, H, N, E] of the last N positions of a path of P to all of it, causally.

    `masks` keeps the [N, P] masks of a plan, so that its layers share them.
    """
    seen = seen_by_segment(query_BHNE.shape[2], key_BKPE.shape[2], query_BHNE, rules, masks)
    key_BKPE, value_BKPE = key_BKPE[:, :, seen.first :], value_BKPE[:, :, seen.first :]
    return attend(query_BHNE, key_BKPE, value_BKPE, rules, seen.mask_NP, is_causal=seen.is_causal)


class Seen(NamedTuple):
    """The keys of a path that the queries at its end see: all from `first` on, or those of the mask."""

    first: int
    mask_NP: torch.Tensor | None
    is_causal: bool


def seen_by_segment(
    num_queries: int, length: int, like: torch.Tensor, rules: Rules, masks: dict[Any, torch.Tensor]
) -> Seen:
    """The keys that the last `num_queries` positions of a path of this length see; `masks` as in
    `attend_segment`.
    """
    first = int(rules.first_visible(length - num_queries))
    is_limited = rules.first_visible(length - 1) > 0
    is_causal = num_queries == length and not is_limited
    if rules.is_fused and (is_causal or num_queries == 1):
        return Seen(first, None, is_causal)
    if not is_limited:
        return Seen(first, _tail_mask(num_queries, length, like, masks), False)
    name = (num_queries, length, rules.reach)
    if name not in masks:
        query_depths, key_depths = np.arange(length - num_queries, length)[:, None], np.arange(first, length)
        visible = (key_depths <= query_depths) & (key_depths >= rules.first_visible(query_depths))
        masks[name] = additive_mask(visible, like)
    return Seen(first, masks[name], False)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rules: Rules,
    mask_NP: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention [B, H, N, E] under an additive mask, which may be missing only under fused kernels."""
    if not rules.is_fused:
        assert mask_NP is not None
        return attend_by_formula(query, key, value, rules, mask_NP)
    if mask_NP is not None and planning_device_type(query.device) == "cuda":
        # its fused kernel for masks takes as many key heads as query heads; else all scores would be kept
        key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_NP,
        is_causal=is_causal,
        scale=rules.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def additive_mask(visible: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """0 where a query sees a key, -inf elsewhere."""
    mask = torch.where(torch.from_numpy(visible), 0.0, float("-inf"))
    return to_device(mask.to(like.dtype), like.device)


def _tail_mask(
    num_queries: int, length: int, like: torch.Tensor, masks: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Causal mask [N, P] of the last N of P positions: the end of a higher and wider one, so that parts and
    paths of all lengths share one.
    """
    is_cuda = planning_device_type(like.device) == "cuda"
    height = num_queries if is_cuda else -(-num_queries // 128) * 128
    name = (height, "tail")
    if name not in masks or masks[name].shape[1] < length:
        width = -(-length // 1024) * 1024
        masks[name] = additive_mask(np.arange(width) <= np.arange(width - height, width)[:, None], like)
    tail_NP = masks[name][height - num_queries :, masks[name].shape[1] - length :]
    if not is_cuda:
        return tail_NP
    exact = (num_queries, length)
    if exact not in masks:
        masks[exact] = tail_NP.contiguous()  # its kernels take no mask that begins at an unaligned address
    return masks[exact]


def attend_by_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules, mask: torch.Tensor
) -> torch.Tensor:
    """Plain torch, for what fused kernels lack: soft-capped scores and attention sinks."""
    key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * rules.scaling
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores + mask
    if rules.sinks_H is not None:
        sinks = rules.sinks_H.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[2]] @ value


def _repeat_heads(tensor_BKPE: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Keys or values [B, H, P, E], one head for each query head."""
    groups = num_heads // tensor_BKPE.shape[1]
    return tensor_BKPE if groups == 1 else tensor_BKPE.repeat_interleave(groups, dim=1)


def _chunk_of_mask(*_: Any, config: Any = None, local_size: int | None = None, **__: Any) -> int | None:
    """In place of a mask, the length of a layer's attention chunks, if it has them. A window is passed to the
    layer itself.
    """
    is_chunk = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    return local_size if is_chunk else None


AttentionInterface.register(FOREST_ATTENTION, forest_attention)
AttentionMaskInterface.register(FOREST_ATTENTION, _chunk_of_mask)
