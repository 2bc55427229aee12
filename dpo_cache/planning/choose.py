"""The default placement of a training run: the fastest that fits the free memory, as `plan` predicts it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from dpo_cache.lm.free_memory import free_bytes, free_host_bytes
from dpo_cache.lm.layerwise.layer_io import NotLayerMajorError
from dpo_cache.lm.model.tensor_names import FAILURES
from dpo_cache.options.placement import ADAPTER_PRESETS, FAST, PRESETS, Placement
from dpo_cache.options.plan import PlanOptions
from dpo_cache.planning.parts import Method, Parts
from dpo_cache.planning.placed import ModelBytes, measure_model, tables_on_host
from dpo_cache.planning.ways import (
    CONTEXT_BYTES,
    PROCESS_BYTES,
    Candidates,
    counts_of,
    device_need,
    host_need,
)
from dpo_cache.planning.workload import measure
from dpo_cache.types import Pair

# The share of the free memory that is left for activations where they cannot be counted
ACTIVATIONS_SHARE = 0.2


def choose_placement(
    config: PreTrainedConfig,
    method: Method,
    device: torch.device,
    options: PlanOptions,
    pairs: Iterable[Pair],
    *,
    present_bytes: int = 0,
) -> tuple[str, Placement]:
    """The name and placement of the first preset that fits the free memory in a step of the longest pairs.

    A device that shares the host's memory (a CPU, MPS) has nowhere to move tensors to, so it gets `fast`. So
    does a model that cannot run layer by layer. `present_bytes` are weights of the model that are on the
    device already.
    """
    if device.type != "cuda":
        return "fast", FAST
    device_bytes = free_bytes(device) + present_bytes
    try:
        workload = measure(pairs, "pairs", options.batch_size)
        counts = counts_of(config, workload, options)
        # the process and its CUDA context exist already
        return first_that_fits(
            Candidates(counts, options, method, 0.0),
            device_bytes + CONTEXT_BYTES,
            free_host_bytes() + PROCESS_BYTES,
        )
    except NotLayerMajorError:
        return "fast", FAST
    except FAILURES:  # its code does not run on tensors without values
        return _by_permanent_tensors(config, method, device_bytes)


def first_that_fits(candidates: Candidates, device_bytes: int, host_bytes: int) -> tuple[str, Placement]:
    """The first preset with a way that fits, as `plan` counts it; the last preset if none does."""

    def fits(device: Parts, host: Parts) -> bool:
        return device_need(device) <= device_bytes and host_need(host) <= host_bytes

    name, placement = "fast", FAST
    for name, placement in candidates.presets():  # the last one is returned
        for way in candidates.variants(name, placement):
            if fits(way.device, way.host):
                return name, placement
            if not fits(Parts(way.device.weights, way.device.gradients, way.device.optimizer), Parts()):
                break  # nor with fewer tokens at once
    return ("fast", FAST) if candidates.refused else (name, placement)


def _by_permanent_tensors(
    config: PreTrainedConfig, method: Method, device_bytes: int
) -> tuple[str, Placement]:
    """The first preset whose permanent tensors leave room for activations; else the last."""
    presets = PRESETS if method.lora_r is None else ADAPTER_PRESETS
    try:
        sizes = measure_model(config, method)
    except (NotLayerMajorError, *FAILURES):
        return "fast", FAST
    for name, placement in presets.items():
        if staying_bytes(sizes, placement) <= (1 - ACTIVATIONS_SHARE) * device_bytes:
            return name, placement
    return list(presets.items())[-1]


def staying_bytes(sizes: ModelBytes, placement: Placement) -> int:
    """Bytes of the permanent tensors: those that are on the device for a whole step."""
    if placement.weights != "device":
        return sizes.rest + 2 * sizes.largest_layer + sizes.head_copy
    if placement.optimizer == "host":
        return sizes.rest + sizes.layers + sizes.head_copy
    gradients = sizes.trained if placement.gradients == "device" else sizes.layer_gradients
    return sizes.weights - tables_on_host(sizes, placement) + gradients + sizes.optimizer
