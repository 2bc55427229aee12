"""The layers that get LoRA under `all-linear`: linear layers that can take it, less the head and towers.

PEFT knows a linear layer by its class. Some models have subclasses of `torch.nn.Linear` that compute
something else: routers of experts that return scores and choices, products by groups of heads. And PEFT
refuses some layers of Mamba models, whose kernels read the weight without the layer. In a model with towers,
the config of an adapter names its layers by their paths, since layers of towers may have the same names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from dpo_cache.errors import OptionError
from dpo_cache.lm.model.architecture import whole_name
from dpo_cache.lm.model.towers import text_filter
from dpo_cache.log import Log

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"

# Subclasses of `torch.nn.Linear` in these packages hold quantized weights, for which PEFT has own layers.
QUANTIZED = ("torch.", "bitsandbytes.", "transformers.integrations.", "transformers.quantizers.", "peft.")


def without_unsuited_layers(model: PreTrainedModel, config: PeftConfig, log: Log) -> PeftConfig:
    """The config with `all-linear` replaced by the suited layers, if there are others; a remark names those.
    Names of layers are replaced by those that rows of text reach, if they fit others.

    Raises `OptionError` where the config names a layer that is linear by its class only.
    """
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        _check_named(model, targets)
        return _without_towers(model, config, targets)
    head = model.get_output_embeddings()
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    is_for_text = text_filter(model)
    of_towers = {name for name in linear if not is_for_text(name)}
    linear = {name: module for name, module in linear.items() if name not in of_towers}
    unsuited = {
        name
        for name, module in linear.items()
        if not is_linear_map(module) or _is_refused(model, config, name.rpartition(".")[2])
    }
    if not unsuited and not of_towers:
        return config
    if unsuited:
        _log_unsuited(model, unsuited, log)
    config = copy.copy(config)
    config.target_modules = linear.keys() - unsuited  # type: ignore[attr-defined]
    return config


def name_layers_of_text(adapted: PeftModel) -> None:
    """Let the adapter's config name its layers by their paths, where the model's checkpoint has towers."""
    model: Any = adapted.get_base_model()
    config, names = adapted.peft_config["default"], getattr(adapted.base_model, "targeted_module_names", None)
    if whole_name(model.config) == type(model).__name__ and names and hasattr(config, "target_modules"):
        config.target_modules = _pattern_of(model, names)
        for field in ("layers_to_transform", "layers_pattern"):  # PEFT takes them only with lists of names
            if hasattr(config, field):
                setattr(config, field, None)


def _pattern_of(model: PreTrainedModel, names: Collection[str]) -> str:
    """A regular expression that fits these modules of the model and no other."""
    numbered = {
        r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        for name in names
    }
    pattern = "|".join(sorted(numbered))
    if {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} <= {*names}:
        return pattern
    return "|".join(map(re.escape, sorted(names)))


def _log_unsuited(model: PreTrainedModel, unsuited: set[str], log: Log) -> None:
    names = sorted({name.rpartition(".")[2] for name in unsuited})
    log(
        f"`lora_targets` all-linear leaves out {', '.join(names)} in {len(unsuited)} place"
        f"{'s' if len(unsuited) > 1 else ''} of {type(model).__name__}: LoRA cannot be added there."
    )


def is_linear_map(module: torch.nn.Module) -> bool:
    """Return whether a layer of a linear class returns one tensor `[N, out]` for `[N, in]`."""
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


def _without_towers(model: PreTrainedModel, config: PeftConfig, targets: Any) -> PeftConfig:
    """The config with a list of names replaced by the layers that rows of text reach, if it fits others."""
    is_for_text = text_filter(model)
    named = {path for path, _ in _named(model, targets)}
    reached = {path for path in named if is_for_text(path)}
    if not reached or reached == named:
        return config
    config = copy.copy(config)
    config.target_modules = reached  # type: ignore[attr-defined]
    return config


def _named(model: PreTrainedModel, targets: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that a list of names fits, as PEFT matches them."""
    names = [] if targets is None or isinstance(targets, str) else list(targets)
    for path, module in model.named_modules():
        if any(path == name or path.endswith(f".{name}") for name in names):
            yield path, module


def _is_refused(model: PreTrainedModel, config: PeftConfig, name: str) -> bool:
    """Return whether PEFT refuses an adapter on layers of this name in this model."""
    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    except ImportError:  # internal to PEFT: it raises its error later
        return False
    try:
        _check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return True
    return False
