"""Passes that run one forest after another through all layers: the peak of what they make, counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.planning.few_layers import over_layers
from dpo_cache.planning.footprint import build_fake, pass_loss, policy_of
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.planning.parts import Method
from dpo_cache.types import Completion

SIMILAR = 0.9  # the second forest's share of the first, from which the second decides the peak


def passes_peak(
    config: PreTrainedConfig,
    method: Method,
    forests: Sequence[Sequence[Completion]],
    *,
    recomputation: str,
    alike: bool,
    device_type: str = "cuda",
) -> int:
    """Peak bytes above the weights of a step over these forests, largest first, until its update.

    The first forest makes the gradients, the second runs while they exist. `alike`: all layers hold the same
    tensors.
    """
    first, second = list(forests[0]), list(forests[1]) if len(forests) > 1 else []
    if second and count_forest_tokens(second) >= SIMILAR * count_forest_tokens(first):
        first, second = [], first

    def peak(one: PreTrainedConfig) -> int:
        return _peak(one, method, first, second, recomputation, device_type)

    # What one forest needs at the end, all gradients, grows with the layers otherwise than at its top.
    return over_layers(peak, config, alike=alike and bool(second))


def _peak(
    config: PreTrainedConfig,
    method: Method,
    first: Sequence[Completion],
    second: Sequence[Completion],
    recomputation: str,
    device_type: str,
) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(device_type):
        model = build_fake(config, method.dtype, lora_r=method.lora_r, lora_targets=method.lora_targets)
        model = policy_of(model, recomputation)
        with LiveBytes() as live:
            if first:
                pass_loss(first, precision=method.precision)(model).backward()
            if second:
                for parameter in model.parameters():
                    if parameter.requires_grad and parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                pass_loss(second, precision=method.precision)(model).backward()
    return live.peak
