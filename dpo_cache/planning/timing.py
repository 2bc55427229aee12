"""The predicted time of a training step and of a scoring run, from operations and the bytes of transfers."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.options.placement import Placement
from dpo_cache.planning.placed import ModelBytes
from dpo_cache.planning.workload import Workload

# The share of the speed of matrix products that training and scoring reach here (docs/measurements.md)
EFFICIENCY = 0.6
PCIE_GBS = {"PCIe 4": 25.0, "PCIe 5": 50.0}
SIZES = {"cuda": 8192, "mps": 2048, "cpu": 1024}  # rows of the square matrices that are multiplied
MEASURED_S = 0.3


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a forward pass."""

    per_token: float  # all layers
    per_target: float  # the head
    per_context: float  # for each pair of a token and a token that it attends to, in all layers


@dataclass(frozen=True)
class Transfers:
    """Bytes of one step over the link between host and device."""

    up: int  # to the device while layers run: weights, layer inputs
    down: int  # to the host while layers run: gradients, layer inputs
    update_up: int  # to the device, for an update of host tensors after the layers
    update_down: int
    up_per_token: float  # the part of `up`, and of `down`, that grows with the tokens
    hidden_from_tokens: dict[
        str, int | None
    ]  # for each link speed: tokens of a step that hide `up` and `down`; None: never

    def pass_s(self, link_gbs: float) -> float:
        """Seconds of `up` and `down`, which run at the same time."""
        return max(self.up, self.down) / (link_gbs * 1e9)

    def update_s(self, link_gbs: float) -> float:
        """Seconds of the update's transfers."""
        return max(self.update_up, self.update_down) / (link_gbs * 1e9)


def count_operations(model: PreTrainedModel) -> Operations:
    """The operations of a model, from the shapes of its weights, which may be fake. Only the experts that a
    token uses count.
    """
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    weights = 0.0
    for layer in decoder_layers(model):
        for name, one in layer.named_parameters():
            is_expert = "expert" in name and "shared" not in name
            weights += one.numel() * (share if is_expert else 1.0) if one.ndim > 1 else 0
    head = getattr(model.get_output_embeddings(), "weight", None)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return Operations(
        per_token=2.0 * weights,
        per_target=2.0 * (0 if head is None else head.numel()),
        per_context=4.0 * heads * width * len(decoder_layers(model)),
    )


def forward_operations(found: Operations, tokens: float, targets: float, context: float) -> float:
    """Operations of a pass over so many tokens, each of which attends to `context` tokens on average."""
    return tokens * (found.per_token + found.per_context * context) + targets * found.per_target


def step_operations(found: Operations, workload: Workload, batch_size: int, *, passes: float) -> float:
    """Operations of a step; `passes` is their number in forward passes."""
    context = (workload.mean_prompt + workload.mean_answer) / 2
    tokens, targets = batch_size * workload.pair_tokens, batch_size * 2 * workload.mean_answer
    return passes * forward_operations(found, tokens, targets, context)


def passes_of(*, is_adapted: bool, recomputes_layers: bool) -> float:
    """A step's operations, in forward passes: the forward pass, gradients of inputs and of weights, and a
    layer that is recomputed.
    """
    return 1.0 + 1.0 + (0.0 if is_adapted else 1.0) + (1.0 if recomputes_layers else 0.0)


def transfers_of(
    sizes: ModelBytes, placement: Placement, inputs: int, tokens: float, seconds_per_token: float
) -> Transfers:
    """The bytes of a layer-major step whose layer inputs take `inputs` bytes."""
    layers = sizes.layers + sizes.head_copy
    states = inputs if placement.inputs == "host" else 0
    up = states
    if placement.weights != "device":
        up += 2 * sizes.layers + sizes.head_copy
    elif placement.optimizer == "host":
        up += layers  # the updated weights, before they are used
    down = states + (sizes.trained if placement.optimizer == "host" or placement.gradients == "host" else 0)
    is_streamed = placement.optimizer == "host"
    states_per_token = states / max(1.0, tokens)
    fixed = max(up - states, down - states)
    return Transfers(
        up=up,
        down=down,
        update_up=2 * sizes.trained + sizes.optimizer if is_streamed else 0,
        update_down=sizes.trained + sizes.optimizer if is_streamed else 0,
        up_per_token=states_per_token,
        hidden_from_tokens={
            name: _hidden_from(fixed, states_per_token, seconds_per_token, speed * 1e9)
            for name, speed in PCIE_GBS.items()
        },
    )


def _hidden_from(fixed: float, per_token: float, seconds_per_token: float, link: float) -> int | None:
    spare = seconds_per_token - per_token / link
    return None if spare <= 0 else round(fixed / link / spare)


def measure_tflops(device: torch.device) -> float:
    """The speed of products of large matrices on this device, in 10^12 operations a second. Takes some tenths
    of a second.
    """
    size = SIZES.get(device.type, SIZES["cpu"])
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    matrix @ matrix  # warms up
    _wait(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_S:
        matrix @ matrix
        _wait(device)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started) / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
