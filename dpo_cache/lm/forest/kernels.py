"""The choice of the kernel that computes a forest's attention, and its plan.

    segments   fused attention, segment by segment or in blocks of neighbouring segments: on every device
    varlen     torch's kernels for sequences of various lengths, in one call per layer: on CUDA
    flex       FlexAttention under a block mask, in one call per layer: on CUDA, compiled; every rule

The self-check takes the first that is exact on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dpo_cache.lm.device import planning_device_type
from dpo_cache.lm.forest.layout import Forest
from dpo_cache.lm.forest.plans import PathPlan, plan_tree
from dpo_cache.lm.forest.segments import Segment, group_segments, segments_of

SEGMENTS, VARLEN, FLEX = "segments", "varlen", "flex"
FLASH_HEAD_SIZE = 256  # the largest head that FlashAttention takes
KERNELS = {"cuda": (VARLEN, FLEX, SEGMENTS)}  # fastest first, by type of device

Paths = dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values of the open path, by layer


def kernels_of(device: torch.device) -> tuple[str, ...]:
    """The kernels to try on this device, fastest first."""
    return KERNELS.get(planning_device_type(device), (SEGMENTS,))


def counted_kernel(model: PreTrainedModel) -> str:
    """The kernel to count memory by, without values: the first on the model's device, as the self-check is
    expected to choose it; but segments, which keep more, where it does not take the model's rules, or runs
    by an operator that has no backward pass without values.
    """
    config = model.config.get_text_config()
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if has_softcap or has_sinks or not _has_flash_heads(config):
        return SEGMENTS
    return kernels_of(model.device)[0]


def _has_flash_heads(config: PreTrainedConfig) -> bool:
    """Return whether FlashAttention takes the heads of a model in 16 bits, see `varlen.py`."""
    names = ("head_dim", "global_head_dim", "swa_head_dim")
    sizes = [size for name in names if (size := getattr(config, name, None))]
    heads = getattr(config, "num_attention_heads", None)
    if not sizes and isinstance(heads, int) and heads:
        sizes = [config.hidden_size // heads]
    has_other_values = getattr(config, "v_head_dim", None) is not None  # multi-head latent attention
    return not has_other_values and all(size % 8 == 0 and size <= FLASH_HEAD_SIZE for size in sizes)


def plan_forest(forest: Forest, device: torch.device, kernel: str = SEGMENTS) -> Any:
    """The plan of a whole forest in one row, with gradients."""
    if kernel == VARLEN:
        from dpo_cache.lm.forest.varlen import VarlenPlan

        return VarlenPlan(segments_of(forest), device)
    if kernel == FLEX:
        from dpo_cache.lm.forest.flex import FlexPlan

        return FlexPlan(segments_of(forest), device)
    assert kernel == SEGMENTS, kernel
    return plan_tree(forest, planning_device_type(device))


def plan_chunk(
    segments: Sequence[Segment], max_depth: int, paths: Paths, device: torch.device, kernel: str = SEGMENTS
) -> Any:
    """The plan of one chunk of a stream, whose longest path has `max_depth` tokens and whose chunks share
    `paths`.
    """
    if kernel == VARLEN:
        from dpo_cache.lm.forest.varlen import VarlenPlan

        return VarlenPlan(segments, device, paths, max_depth)
    if kernel == FLEX:
        from dpo_cache.lm.forest.flex import FlexPlan

        return FlexPlan(segments, device, paths, max_depth)
    assert kernel == SEGMENTS, kernel
    return PathPlan(group_segments(segments), max_depth, paths)
