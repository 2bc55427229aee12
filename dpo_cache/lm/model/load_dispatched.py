"""A checkpoint -> a causal LM spread over devices, the CPU and disk by accelerate, which runs on one of them.

    model = load_dispatched(folder, dtype=torch.bfloat16, device=device, offload_folder=folder)
    logits = model(ids).logits

Each layer runs on the device that has it, or on the first one if the CPU or disk has it: its weights are read
for each pass. Inputs come from the first device, and outputs return to it. The values are those of
`load_model`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from transformers import PreTrainedConfig, PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import SPREAD, computes_on
from dpo_cache.lm.free_memory import free_host_bytes
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.load import load_config, read_base
from dpo_cache.lm.model.parts import decoder_of
from dpo_cache.log import phase

USABLE = 0.8  # share of the host's free memory: loading and activations need the rest

MaxMemory = dict[int | str, int]  # bytes, by the number of a GPU or cpu; disk has what does not fit


@phase("loading the model")
def load_dispatched(
    location: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    offload_folder: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str = "none",
    max_memory: MaxMemory | None = None,
) -> PreTrainedModel:
    """The model in eval mode; `model.device` is where its inputs are to be. Raises `ModelError`.

    `max_memory` bounds what each place may hold (default: what is free there); on a device of type cpu, GPUs
    hold nothing. Weights that must be converted for the disk are written to `offload_folder`.
    """
    parts = locate_checkpoint(location, revision)
    config = load_config(location, revision=revision, trust_remote_code=trust_remote_code)
    check_dispatchable(location, config, revision, quantize=quantize)
    model: Any = read_base(
        parts,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        placing={
            "device_map": "auto",
            "max_memory": max_memory or usual_limits(device),
            "offload_folder": offload_folder,
        },
    )
    places = set(_places(model))
    if len(places) == 1 and "disk" not in places:
        return model
    first = torch.device(model._hf_hook.execution_device)
    for module in (decoder_of(model), model.get_output_embeddings()):
        add_hook_to_module(module, _OutputsOn(first), append=True)
    mark = "several devices" if len(places - {"cpu", "disk"}) > 1 else "one device"
    model.__class__ = computes_on(first, type(model), **{SPREAD: mark})
    return model


def check_dispatchable(
    location: str, config: PreTrainedConfig, revision: str | None, *, quantize: str
) -> None:
    """Raise `ModelError` for an adapter or quantized weights, which are not spread."""
    is_adapter = locate_checkpoint(location, revision).adapter is not None
    is_quantized = quantize != "none" or getattr(config, "quantization_config", None) is not None
    if is_adapter or is_quantized:
        raise ModelError(
            f"{location}: `device_map` auto spreads plain weights, not "
            f"{'an adapter on its base' if is_adapter else 'quantized ones'}.\n"
            "Leave `device_map` out, or use `stream_weights` on."
        )


def describe_places(model: PreTrainedModel) -> str:
    """How many modules each place has: `3 modules on cuda:0, 2 on cpu`."""
    counts = Counter(f"cuda:{place}" if isinstance(place, int) else str(place) for place in _places(model))
    return ", ".join(f"{count} modules on {place}" for place, count in counts.items())


def usual_limits(device: torch.device) -> MaxMemory | None:
    """The memory of each place that may be used by default; None: the free memory of each GPU and of the
    host.
    """
    return {"cpu": int(USABLE * free_host_bytes())} if device.type == "cpu" else None


def _places(model: Any) -> list[Any]:
    return [*getattr(model, "hf_device_map", {"": model.device}).values()]


class _OutputsOn(ModelHook):
    """A module's outputs are moved to a device."""

    def __init__(self, device: torch.device):
        self.device = device

    def post_forward(self, _: torch.nn.Module, output: Any) -> Any:
        return send_to_device(output, self.device)
