"""The layers that get LoRA under `all-linear`: linear layers that can take it, less the head.

PEFT knows a linear layer by its class. Some models have subclasses of `torch.nn.Linear` that compute
something else: routers of experts that return scores and choices, products by groups of heads. And PEFT
refuses some layers of Mamba models, whose kernels read the weight without the layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from dpo_cache.errors import OptionError
from dpo_cache.log import Log

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"

# Subclasses of `torch.nn.Linear` in these packages hold quantized weights, for which PEFT has own layers.
QUANTIZED = ("torch.", "bitsandbytes.", "transformers.integrations.", "transformers.quantizers.", "peft.")


def without_unsuited_layers(model: PreTrainedModel, config: PeftConfig, log: Log) -> PeftConfig:
    """The config with `all-linear` replaced by the suited layers, if there are others; a remark names those.

    Raises `OptionError` where the config names a layer that is linear by its class only.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        _check_named(model, targets)
        return config
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    unsuited = {
        name
        for name, module in linear.items()
        if not is_linear_map(module) or _is_refused(model, config, name.rpartition(".")[2])
    }
    if not unsuited:
        return config
    names = sorted({name.rpartition(".")[2] for name in unsuited})
    log(
        f"`lora_targets` all-linear leaves out {', '.join(names)} in {len(unsuited)} place"
        f"{'s' if len(unsuited) > 1 else ''} of {type(model).__name__}: LoRA cannot be added there."
    )
    config = copy.copy(config)
    config.target_modules = linear.keys() - unsuited  # type: ignore[attr-defined]
    return config


def is_linear_map(module: torch.nn.Module) -> bool:
    """Whether a layer of a linear class returns one tensor `[N, out]` for `[N, in]`."""
    kind = type(module)
    if not isinstance(module, torch.nn.Linear) or kind.forward is torch.nn.Linear.forward:
        return True
    if kind.__module__.startswith(QUANTIZED):
        return True
    inputs = module.weight.new_zeros(1, module.in_features)
    try:
        with torch.no_grad():
            output = module(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return False  # it takes inputs of another shape
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def _check_named(model: PreTrainedModel, targets: Any) -> None:
    for name, module in _named(model, targets):
        if isinstance(module, torch.nn.Linear) and not is_linear_map(module):
            raise OptionError(
                f"{type(model).__name__} cannot take LoRA on {name}: {type(module).__name__} returns more "
                "than one product, or takes inputs of another shape.\nTake it out of `lora_targets`."
            )


def _named(model: PreTrainedModel, targets: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that a list of names fits, as PEFT matches them."""
    names = [] if targets is None or isinstance(targets, str) else list(targets)
    for path, module in model.named_modules():
        if any(path == name or path.endswith(f".{name}") for name in names):
            yield path, module


def _is_refused(model: PreTrainedModel, config: PeftConfig, name: str) -> bool:
    """Whether PEFT refuses an adapter on layers of this name in this model."""
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    except ImportError:  # internal to PEFT: it raises its error later
        return False
    try:
        _check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return True
    return False
