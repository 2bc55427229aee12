"""A policy on several ranks: a copy on each (DDP), or a shard of every weight on each (FSDP2)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.model.adapter import CheckpointLocation
from dpo_cache.lm.model.load import load_base
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.sharded import ShardedModel, shard
from dpo_cache.log import Log
from dpo_cache.training.ranks import Ranks

if TYPE_CHECKING:
    from dpo_cache.lm.layerwise.streamed import StreamedWeights


def parallelize(policy: PolicyModel, ranks: Ranks, *, is_layer_major: bool = False) -> torch.nn.Module:
    """The policy as the module that a step runs: wrapped in `DistributedDataParallel` if each rank has a
    copy.

    The model itself reduces the gradients of shards, and `PlacedGradients` those of a layer-major step.
    """
    if ranks.size == 1 or ranks.shards or is_layer_major:
        return policy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older torch has only this name
        return torch.nn.parallel.DistributedDataParallel(
            policy,
            broadcast_buffers=False,  # no buffer changes in eval mode
            gradient_as_bucket_view=True,  # avoids a second copy of all gradients
            find_unused_parameters=has_unused_weights(policy),  # torch warns if it is not needed
        )


def has_unused_weights(policy: PolicyModel) -> bool:
    """Return whether a backward pass may leave trained weights without a gradient: experts that were not
    chosen, and weights that the model never uses. Afterwards no parameter has a gradient.
    """
    trained = policy.trained
    if any("expert" in name for name in trained):
        return True
    (logps,) = policy([short_rows(policy.model.config.get_text_config().vocab_size, 64)[:2]])
    logps.tokens_T.sum().backward()
    found = any(one.grad is None for one in trained.values())
    for one in trained.values():
        one.grad = None
    return found


def load_to_cut(
    parts: CheckpointLocation, log: Log, **loading: Any
) -> tuple[PreTrainedModel, StreamedWeights | None]:
    """The model on the host, without an adapter, and the reader of its layers' weights for `cut`.

    A layer is in memory only while it is cut. If the checkpoint does not allow that, the whole model is in
    memory.
    """
    device = torch.device("cpu")
    parts = replace(parts, adapter=None)
    try:
        return load_streamed(parts, device=device, weights="disk", **{**loading, "compute_dtype": None})
    except ModelError as error:
        model = load_base(parts, device=device, **loading)  # or raises the error of the checkpoint
        log(f"each rank reads all weights into host memory before it keeps its shards: {first_line(error)}")
        return model, None


def cut(model: PreTrainedModel, device: torch.device, streamed: StreamedWeights | None) -> ShardedModel:
    """Cut a model of `load_to_cut` into shards on the device. Raises `ModelError`."""
    if streamed is None:
        return shard(model, device)
    try:
        return shard(model, device, streamed.keep)
    finally:
        streamed.close()
