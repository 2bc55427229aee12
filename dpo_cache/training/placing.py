"""Chooses the places of weights, gradients, state and layer inputs: by options, as before, or by fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import OptionError
from dpo_cache.log import Log
from dpo_cache.options.placement import ADAPTER_PRESETS, FAST, PRESETS, Placement, placement_of
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.planning.choose import choose_placement
from dpo_cache.planning.parts import LORA_RANK, Method
from dpo_cache.training.layer_major import has_copies
from dpo_cache.training.ranks import Ranks
from dpo_cache.types import Pair

ELSEWHERE = ("host", "disk")  # places other than the device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of this name; `auto` is bf16-mixed on CUDA devices that have it, else fp32."""
    if name != "auto":
        return name
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def planned_method(options: TrainOptions, precision: str, *, is_adapted: bool) -> Method:
    """The training method, for a prediction of its memory. The rank of a saved adapter is still unknown."""
    return Method(
        precision=precision,
        optimizer=options.optimizer.removesuffix("-paged"),
        rounding="stochastic" if options.rounding == "auto" else options.rounding,
        lora_r=(options.lora_r or LORA_RANK) if is_adapted else None,
        lora_targets=options.lora_targets if options.lora_r else "all-linear",
        quantize=None if options.quantize == "none" else options.quantize,
    )


def place_run(
    options: TrainOptions,
    method: Method,
    config: PreTrainedConfig,
    device: torch.device,
    memory: str | None,
    log: Log,
    ranks: Ranks,
    *,
    pairs: Iterable[Pair],
    present_bytes: int = 0,
) -> tuple[str, Placement]:
    """The placement that the options name, or that a resumed run had; else the first that fits all ranks in a
    step of the longest of the `pairs`. `present_bytes` of the model are on the device already.
    """
    is_adapted = method.lora_r is not None
    if ranks.shards:
        return _placement_of_shards(options, is_adapted=is_adapted)
    found = _known_placement(options, memory, is_adapted=is_adapted)
    if found is None:
        planned = planned_options(options, device, ranks.size)
        fitting = choose_placement(config, method, device, planned, pairs, present_bytes=present_bytes)
        found = _agreed(options, ranks.gather(fitting), device, log)
    memory, placement = found
    if is_adapted and options.merge_adapter and has_copies(placement, device):
        option = "memory" if memory in PRESETS else "place"
        raise OptionError(
            f"`merge_adapter` and `{option}` {memory}: merging needs the base's weights on the device.\n"
            "Leave `merge_adapter` out, and merge the adapter afterwards (peft: `merge_and_unload`)."
        )
    if is_adapted and "host" in {options.placement_entry("gradients"), options.placement_entry("optimizer")}:
        log("an adapter's gradients and optimizer state are small: they stay on the device.")
    if options.optimizer == "adafactor" and placement.optimizer == "host" and device.type != "cpu":
        log("Adafactor's update is computed on the host's cores: it needs whole matrices.")
    return memory, placement


def _placement_of_shards(options: TrainOptions, *, is_adapted: bool) -> tuple[str, Placement]:
    """The placement that the options name, in steps that run each forest through all layers."""
    named = options.placement(is_adapted=is_adapted) or FAST
    elsewhere = [name for name in ("weights", "gradients", "optimizer") if getattr(named, name) in ELSEWHERE]
    if elsewhere:
        raise OptionError(
            f"`memory` {options.memory} and `parallel` fsdp: {elsewhere[0]}="
            f"{getattr(named, elsewhere[0])} needs steps that run layer by layer, and each rank has only a "
            "shard of a layer.\n"
            "Leave `memory` and `place` out, since shards take less memory, or use `parallel` ddp."
        )
    if is_adapted and options.merge_adapter:
        raise OptionError(
            "`merge_adapter` and `parallel` fsdp: merging needs the base's weights as a whole.\n"
            "Leave `merge_adapter` out, and merge the adapter afterwards (peft: `merge_and_unload`)."
        )
    placement = replace(named, is_layer_major=False)
    return "fast" if placement == FAST else str(placement), placement


def _known_placement(
    options: TrainOptions, memory: str | None, *, is_adapted: bool
) -> tuple[str, Placement] | None:
    """The placement that the options name, or that a resumed run had in `memory`; None: to be chosen."""
    if (named := options.placement(is_adapted=is_adapted)) is not None:
        is_preset = named == (ADAPTER_PRESETS if is_adapted else PRESETS).get(options.memory)
        return options.memory if is_preset else str(named), named
    if memory in PRESETS:
        return memory, (ADAPTER_PRESETS if is_adapted else PRESETS)[memory]
    if memory and (found := placement_of("auto", memory, is_adapted=is_adapted)):
        return memory, found
    return None


def planned_options(options: TrainOptions, device: torch.device, num_ranks: int = 1) -> PlanOptions:
    """The options of `plan` that predict a step of one rank."""
    return PlanOptions(
        model=options.model or "policy",  # only its config is used
        device=device.type,
        batch_size=math.ceil(options.batch_size / num_ranks),
        budget_tokens=options.budget_tokens,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def _agreed(
    options: TrainOptions, choices: Sequence[tuple[str, Placement]], device: torch.device, log: Log
) -> tuple[str, Placement]:
    """The choice of the rank with the least memory."""
    memory, placement = max(choices, key=lambda choice: list(PRESETS).index(choice[0]))
    if placement.gradients == "none" and options.max_grad_norm:  # the gradient is to be clipped
        placement = replace(placement, gradients="host")
        memory = str(placement)
    if memory != "fast":
        shown = (
            f"`memory` {memory} is used ({placement})" if memory in PRESETS else f"`place` {memory} is used"
        )
        log(f"a step with everything on the device does not fit the free memory of {device}: {shown}.")
    return memory, placement
