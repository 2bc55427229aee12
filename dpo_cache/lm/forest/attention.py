"""Attention over a token forest, as a function that transformers models call.

    A segment attends to the path it continues, all of it, and causally to itself.

Two plans tell which keys those are. `PathPlan` (scoring, no gradients) keeps the keys and values of the
open path in a buffer per layer, so the path of a segment is the front of that buffer, and carries over
into the next chunk. `TreePlan` (training) finds every path within one row, by gradient-friendly slices.
The plan travels as the keyword argument `forest_plan` of the model call; no [L, L] mask exists anywhere.

B = 1 rows, H query heads, K key heads, L row length, N tokens of a block, P path plus block, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from dpo_cache.lm.device import planning_device_type
from dpo_cache.lm.forest.layout import Forest
from dpo_cache.lm.memory.recompute_later import recompute_later

FOREST_ATTENTION = "dpo_cache_forest"

QUERY_TOKENS = (
    128  # of a segment that are attended at once: half of what a block computes within itself is hidden
)

# What one more call of the attention kernel costs, in pairs of a query and a key that could be computed
# meanwhile.
CALL_COST = 4000


class PlanLostError(Exception):
    """The model's code drops the keyword argument that carries the plan."""


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
    chunk: int | None = (
        None  # depths are parted in chunks of this length, and a query sees its own chunk alone
    )
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None

    def first_visible(self, depths: Any) -> Any:
        """Depth of the first key that queries at these depths see; an int or a numpy array of them."""
        if self.window is not None:
            return np.maximum(depths - self.window + 1, 0)
        return depths // self.chunk * self.chunk if self.chunk is not None else depths * 0

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """What tells the masks of two layers apart."""
        return self.window, self.chunk


@dataclass(frozen=True, eq=False)
class Block:
    """Neighbouring segments that are attended at once: their keys are the path of the first one, then their
    own.
    """

    segments: Sequence[Segment]

    @property
    def path(self) -> int:
        """Tokens of the open path among the keys; what later segments see beside it, the block has brought
        itself.
        """
        return self.segments[0].depth

    @property
    def start(self) -> int:
        return self.segments[0].start

    @property
    def end(self) -> int:
        return self.segments[-1].end

    def last_places(self) -> tuple[np.ndarray, np.ndarray]:
        """What the block leaves on the open path: depths, and the place in the block of the token that stands
        there.
        """
        place_at: dict[int, int] = {}
        for segment in self.segments:
            place_at.update(
                zip(
                    range(segment.depth, segment.depth + segment.end - segment.start),
                    range(segment.start, segment.end),
                    strict=True,
                )
            )
        final = self.segments[-1]
        open_depths = [depth for depth in place_at if depth < final.depth + final.end - final.start]
        return np.array(open_depths), np.array([place_at[depth] for depth in open_depths]) - self.start

    def visible_NP(self) -> np.ndarray:
        """Which keys each token of the block sees: bool [N, path + N]."""
        visible = np.zeros((self.end - self.start, self.path + self.end - self.start), bool)
        # by depth, along the open path
        key_at = np.arange(max(segment.depth + segment.end - segment.start for segment in self.segments))
        for segment in self.segments:
            length, first = segment.end - segment.start, segment.start - self.start
            rows = slice(first, first + length)
            visible[rows, key_at[: segment.depth]] = True
            visible[rows, self.path + first : self.path + first + length] = np.tri(length, dtype=bool)
            key_at[segment.depth : segment.depth + length] = self.path + np.arange(first, first + length)
        return visible

    def key_depths_P(self) -> np.ndarray:
        """Depth of every key."""
        own = [
            np.arange(segment.depth, segment.depth + segment.end - segment.start) for segment in self.segments
        ]
        return np.concatenate([np.arange(self.path), *own])


def group_segments(segments: Sequence[Segment], call_cost: int = CALL_COST) -> list[Block]:
    """Neighbouring segments in blocks, where the pairs of query and key that a mask hides cost less than a
    call of their own.
    """
    blocks: list[Block] = []
    for part in (part for segment in segments for part in split_segment(segment)):
        alone = Block([part])
        together = Block([*blocks[-1].segments, part]) if blocks else alone
        if blocks and _num_pairs(together) <= _num_pairs(blocks[-1]) + _num_pairs(alone) + call_cost:
            blocks[-1] = together
        else:
            blocks.append(alone)
    return blocks


def _num_pairs(block: Block) -> int:
    length = block.end - block.start
    return length * (block.path + length)


@dataclass
class PathPlan:
    """Plan of one chunk of a stream; `paths` is shared by all chunks of the stream."""

    blocks: Sequence[Block]
    max_depth: int
    paths: dict[int, tuple[torch.Tensor, torch.Tensor]]
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query_BHLE: torch.Tensor,
        key_BKLE: torch.Tensor,
        value_BKLE: torch.Tensor,
        rules: Rules,
    ) -> torch.Tensor:
        """Attention output [B, L, H, E]."""
        keys, values = self._path_buffers(layer, key_BKLE, value_BKLE)
        output = query_BHLE.new_empty(1, query_BHLE.shape[2], query_BHLE.shape[1], value_BKLE.shape[3])
        for block in self.blocks:
            here = slice(block.start, block.end)
            query, key, value = query_BHLE[:, :, here], key_BKLE[:, :, here], value_BKLE[:, :, here]
            if len(block.segments) == 1:
                end = block.path + block.end - block.start
                keys[:, :, block.path : end] = key
                values[:, :, block.path : end] = value
                part = attend_segment(query, keys[:, :, :end], values[:, :, :end], rules, self.masks)
            else:
                seen_keys = torch.cat([keys[:, :, : block.path], key], dim=2)
                seen_values = torch.cat([values[:, :, : block.path], value], dim=2)
                part = attend_masked(
                    query, seen_keys, seen_values, rules, self._block_mask(block, query, rules)
                )
                depths, places = self._last_places(block, query.device)
                keys[:, :, depths] = key[:, :, places]
                values[:, :, depths] = value[:, :, places]
            output[:, here] = part.transpose(1, 2)
        return output

    def _path_buffers(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.paths:
            self.paths[layer] = tuple(  # type: ignore[assignment]
                tensor.new_empty(1, tensor.shape[1], self.max_depth, tensor.shape[3])
                for tensor in (key, value)
            )
        return self.paths[layer]

    def _block_mask(self, block: Block, like: torch.Tensor, rules: Rules) -> torch.Tensor:
        """Additive mask [N, P] of a block of several segments."""
        name = (id(block), rules.reach)
        if name not in self.masks:
            depths = block.key_depths_P()
            visible = block.visible_NP() & (depths >= rules.first_visible(depths[block.path :, None]))
            self.masks[name] = _additive(visible, like)
        return self.masks[name]

    def _last_places(self, block: Block, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        name = (id(block), "last places")
        if name not in self.masks:
            self.masks[name] = tuple(torch.from_numpy(places).to(device) for places in block.last_places())  # type: ignore[assignment]
        return self.masks[name]  # type: ignore[return-value]


@dataclass
class TreePlan:
    """Plan of a whole forest in one row."""

    segments: Sequence[Segment]
    atom_lengths: list[int]  # the row cut at every segment start and every branching point
    path_atoms: list[list[int]]  # per segment: the atoms of its path, then its own
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def attend(
        self, _: int, query_BHLE: torch.Tensor, key_BKLE: torch.Tensor, value_BKLE: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        """Attention output [B, L, H, E]. One split of q, k and v each: its gradient is one concatenation."""
        queries = query_BHLE.split([segment.end - segment.start for segment in self.segments], dim=2)
        keys, values = key_BKLE.split(self.atom_lengths, dim=2), value_BKLE.split(self.atom_lengths, dim=2)
        parts = []
        for query, atoms in zip(queries, self.path_atoms, strict=True):
            path_keys, path_values = (
                _join_path([tensors[atom] for atom in atoms]) for tensors in (keys, values)
            )
            parts.append(attend_segment(query, path_keys, path_values, rules, self.masks))
        return recompute_later(_join_segments, *parts)


def plan_tree(forest: Forest, device_type: str = "cpu") -> TreePlan:
    """The plan that runs a whole forest at once.

    On a CPU, segments with a path are cut into parts: what a part's mask hides is not computed. Each part
    keeps its path's keys and values for the backward pass, which on a GPU takes more memory than whole
    segments save it time.
    """
    part_tokens = QUERY_TOKENS if device_type == "cpu" else max(1, len(forest))
    firsts = zip(forest.starts, np.append(forest.starts[1:], len(forest)), strict=True)
    starts = np.concatenate(
        [
            np.arange(start, end, part_tokens if forest.depths_L[start] else len(forest))
            for start, end in firsts
        ]
    )
    ends = np.append(starts[1:], len(forest))
    branches = forest.parents_L[starts] + 1  # behind the token that each segment continues
    cuts = np.unique(np.concatenate([starts, branches[branches > 0], [len(forest)]]))
    atom_of = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    atoms_to_root: list[list[int]] = []
    for first in cuts[:-1]:
        parent = forest.parents_L[first]
        above = atoms_to_root[atom_of[parent]] if parent >= 0 else []
        atoms_to_root.append([*above, len(atoms_to_root)])
    segments = [
        Segment(int(start), int(end), int(forest.depths_L[start]))
        for start, end in zip(starts, ends, strict=True)
    ]
    return TreePlan(
        segments, np.diff(cuts).tolist(), [atoms_to_root[atom_of[segment.end - 1]] for segment in segments]
    )


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
    num_queries, length = query_BHNE.shape[2], key_BKPE.shape[2]
    first, is_limited = (
        int(rules.first_visible(length - num_queries)),
        int(rules.first_visible(length - 1)) > 0,
    )
    key_BKPE, value_BKPE = key_BKPE[:, :, first:], value_BKPE[:, :, first:]
    is_plain = rules.softcap is None and rules.sinks_H is None
    is_causal = num_queries == length and not is_limited
    if is_plain and (is_causal or num_queries == 1):
        return _attend_fused(query_BHNE, key_BKPE, value_BKPE, rules, None, is_causal)
    if not is_limited:
        return attend_masked(
            query_BHNE, key_BKPE, value_BKPE, rules, _tail_mask(num_queries, length, query_BHNE, masks)
        )
    name = (num_queries, length, rules.reach)
    if name not in masks:
        query_depths, key_depths = np.arange(length - num_queries, length)[:, None], np.arange(first, length)
        masks[name] = _additive(
            (key_depths <= query_depths) & (key_depths >= rules.first_visible(query_depths)), query_BHNE
        )
    return attend_masked(query_BHNE, key_BKPE, value_BKPE, rules, masks[name])


def _tail_mask(
    num_queries: int, length: int, like: torch.Tensor, masks: dict[Any, torch.Tensor]
) -> torch.Tensor:
    """Causal mask [N, P] of the last N of P positions: the end of a wider one, so that paths of all lengths
    share one.
    """
    name = (num_queries, "tail")
    if name not in masks or masks[name].shape[1] < length:
        width = -(-length // 1024) * 1024
        masks[name] = _additive(np.arange(width) <= np.arange(width - num_queries, width)[:, None], like)
    tail_NP = masks[name][:, masks[name].shape[1] - length :]
    if planning_device_type(like.device) != "cuda":
        return tail_NP
    own = (num_queries, length)
    if own not in masks:
        masks[own] = tail_NP.contiguous()  # its kernels take no mask that begins amid an address
    return masks[own]


def _join_path(atoms_BKLE: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys or values of a whole path; a copy, but where it is in one piece."""
    return recompute_later(_concatenate, *atoms_BKLE) if len(atoms_BKLE) > 1 else atoms_BKLE[0]


def _concatenate(*tensors_BKLE: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors_BKLE, dim=2)


def _join_segments(*parts_BHNE: torch.Tensor) -> torch.Tensor:
    """Output [B, L, H, E] of all segments, laid out as the next product reads it."""
    return torch.cat(parts_BHNE, dim=2).transpose(1, 2).contiguous()


def split_segment(segment: Segment, num_queries: int = QUERY_TOKENS) -> list[Segment]:
    """The segment in parts, each of which continues the one before it: what a part's mask hides is not
    computed.
    """
    cuts = [*range(segment.start, segment.end, num_queries), segment.end]
    return [Segment(start, end, segment.depth + start - segment.start) for start, end in pairwise(cuts)]


def attend_masked(
    query_BHNE: torch.Tensor,
    key_BKPE: torch.Tensor,
    value_BKPE: torch.Tensor,
    rules: Rules,
    mask_NP: torch.Tensor,
) -> torch.Tensor:
    """Attention [B, H, N, E] of N queries to P keys under an additive mask."""
    if rules.softcap is not None or rules.sinks_H is not None:
        return _attend_plainly(query_BHNE, key_BKPE, value_BKPE, rules, mask_NP)
    return _attend_fused(query_BHNE, key_BKPE, value_BKPE, rules, mask_NP, is_causal=False)


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rules: Rules,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    if mask is not None and planning_device_type(query.device) == "cuda":
        # its fused kernel for masks takes as many key heads as query heads; else all scores would be kept
        key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=rules.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: int | None,  # what `_chunk_of_mask` returns: no mask is built
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    forest_plan: Any = None,  # a PathPlan, TreePlan or FlexPlan
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What a transformers model calls in place of its own attention; output [B, L, H, E]."""
    if forest_plan is None:
        raise PlanLostError
    assert dropout == 0.0, "the forest shares prefixes, which dropout forbids"
    rules = Rules(
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        attention_mask,
        softcap,
        s_aux,
    )
    return forest_plan.attend(id(module), query, key, value, rules), None


def use_forest_attention(model: PreTrainedModel) -> bool:
    """Switch the model to forest attention; False where its code does not allow another attention."""
    if not model._can_set_attn_implementation():
        return False
    model.set_attn_implementation(FOREST_ATTENTION)
    return model.config._attn_implementation == FOREST_ATTENTION


def _additive(visible: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """0 where a query may look, -inf elsewhere."""
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf"))).to(
        dtype=like.dtype, device=like.device
    )


def _attend_plainly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules, mask: torch.Tensor
) -> torch.Tensor:
    """Attention by its formula, for what fused kernels lack: soft-capped scores and attention sinks."""
    key, value = (_repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * rules.scaling
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores + mask
    if rules.sinks_H is not None:
        sinks = (
            rules.sinks_H.reshape(1, -1, 1, 1).expand(1, scores.shape[1], scores.shape[2], 1).to(scores.dtype)
        )
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights[..., : key.shape[2]] @ value


def _repeat_heads(tensor_BKPE: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Keys or values [B, H, P, E], one head for each query head."""
    groups = num_heads // tensor_BKPE.shape[1]
    return tensor_BKPE if groups == 1 else tensor_BKPE.repeat_interleave(groups, dim=1)


def _chunk_of_mask(*_: Any, config: Any = None, local_size: int | None = None, **__: Any) -> int | None:
    """What stands in for a mask: the length of a layer's attention chunks, if it has them; a window is told
    to the layer itself.
    """
    return (
        local_size
        if local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
        else None
    )


AttentionInterface.register(FOREST_ATTENTION, forest_attention)
AttentionMaskInterface.register(FOREST_ATTENTION, _chunk_of_mask)
