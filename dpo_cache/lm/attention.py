"""Attention over a token forest, as a function that transformers models call.

    A segment attends to the path it continues, all of it, and causally to itself.

Two plans tell which keys those are. `PathPlan` (scoring, no gradients) keeps the keys and values of the
open path in a buffer per layer, so the path of a segment is the front of that buffer, and carries over
into the next chunk. `TreePlan` (training) finds every path within one row, by gradient-friendly slices.
The plan travels as the keyword argument `forest_plan` of the model call; no [L, L] mask exists anywhere.

B = 1 rows, H query heads, K key heads, L row length, N segment length, P path plus segment, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_cache.lm.forest import Forest

FOREST_ATTENTION = "dpo_cache_forest"


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the row; the first has `depth` tokens before it on its path."""

    start: int
    end: int
    depth: int


@dataclass(frozen=True)
class Rules:
    """What a layer adds to plain causal attention."""

    scaling: float
    window: int | None = None  # a query sees keys less than this many tokens back
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None


@dataclass
class PathPlan:
    """Plan of one chunk of a stream; `paths` is shared by all chunks of the stream."""

    segments: Sequence[Segment]
    max_depth: int
    paths: dict[int, tuple[torch.Tensor, torch.Tensor]]
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def attend(self, layer: int, query_BHLE: torch.Tensor, key_BKLE: torch.Tensor, value_BKLE: torch.Tensor, rules: Rules) -> torch.Tensor:
        """Attention output [B, L, H, E]."""
        keys, values = self._path_buffers(layer, key_BKLE, value_BKLE)
        output = query_BHLE.new_empty(1, query_BHLE.shape[2], query_BHLE.shape[1], value_BKLE.shape[3])
        for segment in self.segments:
            here, end = slice(segment.start, segment.end), segment.depth + segment.end - segment.start
            keys[:, :, segment.depth : end] = key_BKLE[:, :, here]
            values[:, :, segment.depth : end] = value_BKLE[:, :, here]
            part = attend_segment(query_BHLE[:, :, here], keys[:, :, :end], values[:, :, :end], rules, self.masks)
            output[:, here] = part.transpose(1, 2)
        return output

    def _path_buffers(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.paths:
            self.paths[layer] = tuple(  # type: ignore[assignment]
                tensor.new_empty(1, tensor.shape[1], self.max_depth, tensor.shape[3]) for tensor in (key, value)
            )
        return self.paths[layer]


@dataclass
class TreePlan:
    """Plan of a whole forest in one row."""

    segments: Sequence[Segment]
    atom_lengths: list[int]  # the row cut at every segment start and every branching point
    path_atoms: list[list[int]]  # per segment: the atoms of its path, then its own
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def attend(self, _: int, query_BHLE: torch.Tensor, key_BKLE: torch.Tensor, value_BKLE: torch.Tensor, rules: Rules) -> torch.Tensor:
        """Attention output [B, L, H, E]. One split of q, k and v each: its gradient is one concatenation."""
        queries = query_BHLE.split([segment.end - segment.start for segment in self.segments], dim=2)
        keys, values = key_BKLE.split(self.atom_lengths, dim=2), value_BKLE.split(self.atom_lengths, dim=2)
        parts = []
        for query, atoms in zip(queries, self.path_atoms, strict=True):
            path_keys = torch.cat([keys[atom] for atom in atoms], dim=2)
            path_values = torch.cat([values[atom] for atom in atoms], dim=2)
            parts.append(attend_segment(query, path_keys, path_values, rules, self.masks))
        return torch.cat(parts, dim=2).transpose(1, 2)


def plan_tree(forest: Forest) -> TreePlan:
    """The plan that runs a whole forest at once."""
    starts = forest.starts
    ends = np.append(starts[1:], len(forest))
    branches = forest.parents_L[starts] + 1  # behind the token that each segment continues
    cuts = np.unique(np.concatenate([starts, branches[branches > 0], [len(forest)]]))
    atom_of = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    atoms_to_root: list[list[int]] = []
    for first in cuts[:-1]:
        parent = forest.parents_L[first]
        above = atoms_to_root[atom_of[parent]] if parent >= 0 else []
        atoms_to_root.append([*above, len(atoms_to_root)])
    segments = [Segment(int(start), int(end), int(forest.depths_L[start])) for start, end in zip(starts, ends, strict=True)]
    return TreePlan(segments, np.diff(cuts).tolist(), [atoms_to_root[atom_of[segment.end - 1]] for segment in segments])


def attend_segment(
    query_BHNE: torch.Tensor, key_BKPE: torch.Tensor, value_BKPE: torch.Tensor, rules: Rules, masks: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Attention [B, H, N, E] of the last N positions of a path of P to all of it, causally.

    `masks` keeps the [N, P] masks of a plan, so that its layers share them.
    """
    num_queries = query_BHNE.shape[2]
    if rules.window is not None and key_BKPE.shape[2] > rules.window + num_queries - 1:
        visible = rules.window + num_queries - 1
        key_BKPE, value_BKPE = key_BKPE[:, :, -visible:], value_BKPE[:, :, -visible:]
    length = key_BKPE.shape[2]
    window = rules.window if rules.window is not None and length > rules.window else None
    if rules.softcap is not None or rules.sinks_H is not None:
        return _attend_plainly(query_BHNE, key_BKPE, value_BKPE, rules, _mask(num_queries, length, window, query_BHNE, masks))
    is_causal = num_queries == length and window is None
    needs_mask = not is_causal and (num_queries > 1 or window is not None)
    return F.scaled_dot_product_attention(
        query_BHNE,
        key_BKPE,
        value_BKPE,
        attn_mask=_mask(num_queries, length, window, query_BHNE, masks) if needs_mask else None,
        is_causal=is_causal,
        scale=rules.scaling,
        enable_gqa=query_BHNE.shape[1] != key_BKPE.shape[1],
    )


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  (always None: no mask is built)
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    forest_plan: PathPlan | TreePlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What a transformers model calls in place of its own attention; output [B, L, H, E]."""
    assert forest_plan is not None, "a model set to forest attention is called with a plan"
    assert dropout == 0.0, "the forest shares prefixes, which dropout forbids"
    rules = Rules(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux)
    return forest_plan.attend(id(module), query, key, value, rules), None


def use_forest_attention(model: PreTrainedModel) -> bool:
    """Switch the model to forest attention; False where its code does not allow another attention."""
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(FOREST_ATTENTION)
    return model.config._attn_implementation == FOREST_ATTENTION


def _mask(num_queries: int, length: int, window: int | None, like: torch.Tensor, masks: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Additive mask [N, P]: 0 where a query may look, -inf elsewhere."""
    shape = (num_queries, length, window)
    if shape not in masks:
        positions = torch.arange(length, device=like.device)
        back = positions[-num_queries:, None] - positions
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        masks[shape] = torch.zeros(num_queries, length, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
    return masks[shape]


def _attend_plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules, mask: torch.Tensor) -> torch.Tensor:
    """Attention by its formula, for what fused kernels lack: soft-capped scores and attention sinks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * rules.scaling
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores + mask
    if rules.sinks_H is not None:
        sinks = rules.sinks_H.reshape(1, -1, 1, 1).expand(1, scores.shape[1], scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[2]] @ value


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(FOREST_ATTENTION, forest_attention)
AttentionMaskInterface.register(FOREST_ATTENTION, _no_mask)
