"""Plans of a forest's attention: which keys each segment sees, and where they are kept.

`PathPlan` (scoring, no gradients) keeps the keys and values of the open path in one buffer per layer, so the
path of a segment is the front of that buffer, and the next chunk continues it. `TreePlan` (training) finds
every path within one row, by slices through which gradients pass. Neither builds an [L, L] mask.

B = 1 rows, H query heads, K key heads, L row length, N tokens of a block, P path plus block, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dpo_cache.lm.device import to_device
from dpo_cache.lm.forest.attention import Rules, additive_mask, attend, attend_segment, seen_by_segment
from dpo_cache.lm.forest.layout import Forest
from dpo_cache.lm.forest.segments import Block, Segment, last_at_each_depth, segments_of, split_segment
from dpo_cache.lm.kernels.tree_attention import Part, attend_tree, can_attend_tree, has_kernels
from dpo_cache.lm.memory.recompute_later import recompute_later


@dataclass
class PathPlan:
    """Plan of one chunk of a stream; `paths` is shared by all chunks of the stream."""

    blocks: Sequence[Block]
    max_depth: int
    paths: dict[int, tuple[torch.Tensor, torch.Tensor]]
    masks: dict[torch.device, dict[Any, Any]] = field(default_factory=dict)

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
        masks = self.masks.setdefault(query_BHLE.device, {})  # layers may be on several devices
        output = query_BHLE.new_empty(1, query_BHLE.shape[2], query_BHLE.shape[1], value_BKLE.shape[3])
        for block in self.blocks:
            here = slice(block.start, block.end)
            query, key, value = query_BHLE[:, :, here], key_BKLE[:, :, here], value_BKLE[:, :, here]
            if len(block.segments) == 1:
                end = block.segments[0].end_depth
                keys[:, :, block.path_length : end] = key
                values[:, :, block.path_length : end] = value
                part = attend_segment(query, keys[:, :, :end], values[:, :, :end], rules, masks)
            else:
                seen_keys = torch.cat([keys[:, :, : block.path_length], key], dim=2)
                seen_values = torch.cat([values[:, :, : block.path_length], value], dim=2)
                part = attend(query, seen_keys, seen_values, rules, _block_mask(block, query, rules, masks))
                depths, places = _last_places(block, query.device, masks)
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


@dataclass
class TreePlan:
    """Plan of a whole forest in one row."""

    segments: Sequence[Segment]
    atom_lengths: list[int]  # the row cut at every segment start and every branching point
    path_atoms: list[list[int]]  # for each segment: the atoms of its path, then its own
    is_one_operation: bool = False  # where rules and tensors allow it, see `tree_attention.py`
    masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def attend(
        self, _: int, query_BHLE: torch.Tensor, key_BKLE: torch.Tensor, value_BKLE: torch.Tensor, rules: Rules
    ) -> torch.Tensor:
        """Attention output [B, L, H, E]. One split of q, k and v each: its gradient is one concatenation."""
        if self.is_one_operation and rules.is_fused and can_attend_tree(query_BHLE, key_BKLE, value_BKLE):
            parts = [
                self._part(segment, atoms, query_BHLE, rules)
                for segment, atoms in zip(self.segments, self.path_atoms, strict=True)
            ]
            return attend_tree(query_BHLE, key_BKLE, value_BKLE, parts, rules.scaling)
        queries = query_BHLE.split([segment.length for segment in self.segments], dim=2)
        keys, values = key_BKLE.split(self.atom_lengths, dim=2), value_BKLE.split(self.atom_lengths, dim=2)
        outputs = []
        for query, atoms in zip(queries, self.path_atoms, strict=True):
            path_keys, path_values = (
                _join_path([tensors[atom] for atom in atoms]) for tensors in (keys, values)
            )
            outputs.append(attend_segment(query, path_keys, path_values, rules, self.masks))
        # laid out as the next product reads it
        return recompute_later(lambda *parts: torch.cat(parts, dim=2).transpose(1, 2).contiguous(), *outputs)

    def _part(self, segment: Segment, atoms: list[int], like: torch.Tensor, rules: Rules) -> Part:
        seen = seen_by_segment(segment.length, segment.end_depth, like, rules, self.masks)
        path, hidden = [], seen.first
        for start, end in _ranges(self.atom_lengths, atoms):
            visible = min(start + hidden, end)
            hidden -= visible - start
            if visible < end:
                path.append((visible, end))
        return Part(segment.start, segment.end, path, seen.mask_NP, seen.is_causal)


def plan_tree(forest: Forest, device_type: str = "cpu") -> TreePlan:
    """The plan that runs a whole forest at once.

    On a CPU, segments are split, so that less is computed that a mask hides. Where torch lacks the kernels
    of `tree_attention.py`, each part keeps its path's keys and values for the backward pass, and segments
    without a path stay whole. On a GPU that memory is worth more than the time saved, so all stay whole.
    """
    segments = segments_of(forest)
    is_one_operation = device_type == "cpu" and has_kernels()
    if device_type == "cpu":
        segments = [
            part
            for segment in segments
            for part in (split_segment(segment) if segment.depth or is_one_operation else [segment])
        ]
    starts = [segment.start for segment in segments]
    branches = forest.parents_L[starts] + 1  # behind the token that each segment continues
    cuts = np.unique([*starts, *branches, len(forest)])
    atom_of = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))
    atoms_to_root: list[list[int]] = []
    for first in cuts[:-1]:
        parent = forest.parents_L[first]
        above = atoms_to_root[atom_of[parent]] if parent >= 0 else []
        atoms_to_root.append([*above, len(atoms_to_root)])
    path_atoms = [atoms_to_root[atom_of[segment.end - 1]] for segment in segments]
    return TreePlan(segments, np.diff(cuts).tolist(), path_atoms, is_one_operation)


def _block_mask(block: Block, like: torch.Tensor, rules: Rules, masks: dict[Any, Any]) -> torch.Tensor:
    """Additive mask [N, P] of a block of several segments."""
    name = (id(block), rules.reach)
    if name not in masks:
        depths_N = block.depths_N()
        depths_P = np.concatenate([np.arange(block.path_length), depths_N])
        visible = block.visible_NP() & (depths_P >= rules.first_visible(depths_N[:, None]))
        masks[name] = additive_mask(visible, like)
    return masks[name]


def _last_places(
    block: Block, device: torch.device, masks: dict[Any, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    name = (id(block), "last places")
    if name not in masks:
        depths, places = last_at_each_depth(block.depths_N())
        masks[name] = to_device(depths, device), to_device(places, device)
    return masks[name]


def _ranges(atom_lengths: Sequence[int], atoms: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges of the row that the atoms cover, in their order; neighbouring ones are one range."""
    ends = np.cumsum(atom_lengths)
    ranges: list[tuple[int, int]] = []
    for atom in atoms:
        start, end = int(ends[atom]) - atom_lengths[atom], int(ends[atom])
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return ranges


def _join_path(atoms_BKLE: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys or values of a whole path; a copy unless it is in one piece."""
    if len(atoms_BKLE) == 1:
        return atoms_BKLE[0]
    return recompute_later(lambda *atoms: torch.cat(atoms, dim=2), *atoms_BKLE)
