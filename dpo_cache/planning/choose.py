"""The default placement of a training run: the fastest one that fits the device's free memory."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError
from dpo_cache.options.placement import ADAPTER_PRESETS, FAST, PRESETS, Placement
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import ModelBytes, measure_model

# The share of the free memory that is left for activations, which a step can make smaller
ACTIVATIONS_SHARE = 0.2


def choose_placement(config: PreTrainedConfig, method: Method, device: torch.device) -> tuple[str, Placement]:
    """The name and placement of the first preset whose permanent tensors fit the device's free memory.

    A device that shares the host's memory (a CPU, MPS) has nowhere to move tensors to, so it gets `fast`. So
    does a model whose sizes are unknown without its weights.
    """
    if device.type != "cuda":
        return "fast", FAST
    try:
        sizes = measure_model(config, method)
    except (NotLayerMajorError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        return "fast", FAST
    free = torch.cuda.mem_get_info(device)[0]
    return first_that_fits(sizes, free, is_adapted=method.lora_r is not None)


def first_that_fits(sizes: ModelBytes, free_bytes: int, *, is_adapted: bool) -> tuple[str, Placement]:
    """The first preset whose permanent tensors on the device leave room for activations; else the last."""
    presets = ADAPTER_PRESETS if is_adapted else PRESETS
    room = (1 - ACTIVATIONS_SHARE) * free_bytes
    for name, placement in presets.items():
        if staying_bytes(sizes, placement) <= room:
            return name, placement
    return list(presets.items())[-1]


def staying_bytes(sizes: ModelBytes, placement: Placement) -> int:
    """Bytes of the permanent tensors: those that are on the device for a whole step."""
    if placement.weights != "device":
        return sizes.rest + 2 * sizes.largest_layer + sizes.head_copy
    if placement.optimizer == "host":
        return sizes.rest + sizes.layers + sizes.head_copy
    gradients = sizes.trained if placement.gradients == "device" else sizes.layer_gradients
    return sizes.weights + gradients + sizes.optimizer
