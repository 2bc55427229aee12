"""The former form of an identity, to recognize what was scored under it. Nothing is published under it.

It left out which modules an adapter is applied to, and the code that a checkpoint brings. Tensors counted
even if the model does not load them, in the dtype in which they were stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from dpo_cache.lm.model.adapter import WEIGHTS_FILE, CheckpointLocation, read_config
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.config_fields import INERT_FIELDS, UNMADE, plain
from dpo_cache.lm.model.tensor_digest import weights_digest
from dpo_cache.types import QUANTIZATION_FIELDS

# fmt: off
INERT_ADAPTER_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type",
        "peft_version", "lora_dropout", "module_dropout", "init_weights", "init_ia3_weights",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
        "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
        "ensure_weight_tying",
    }
)
# fmt: on


def former_identity(
    parts: CheckpointLocation, config: PreTrainedConfig, dtype: torch.dtype, quantize: str
) -> dict[str, Any]:
    """The former identity of a located checkpoint with this config."""
    identity: dict[str, Any] = {
        "scoring": 1,
        "weights": weights_digest(checkpoint_files(parts.base, revision=parts.base_revision)),
        "config": _former_fields(config),
        "dtype": str(dtype).removeprefix("torch."),
    }
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        identity["quantization"] = dict(saved) if isinstance(saved, dict) else saved.to_dict()
    elif quantize != "none":
        identity["quantization"] = dict(QUANTIZATION_FIELDS[quantize])
    if parts.adapter is not None:
        identity["adapter"] = _former_adapter(parts.adapter)
    return identity


def _former_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = plain(config.to_dict())
    try:
        defaults = plain(type(config)().to_dict())
    except UNMADE:
        defaults = {}
    inert = INERT_FIELDS - {"transformers_weights", "auto_map"}
    kept = {
        name: value
        for name, value in fields.items()
        if name not in inert and (name not in defaults or value != defaults[name])
    }
    return {**kept, "model_type": config.model_type}


def _former_adapter(folder: str) -> dict[str, Any]:
    config = read_config(folder)
    fields, defaults = config.to_dict(), type(config)().to_dict()
    kept = {
        name: value
        for name, value in fields.items()
        if name not in INERT_ADAPTER_FIELDS and value != defaults.get(name)
    }
    return {
        "weights": weights_digest([Path(folder, WEIGHTS_FILE)]),
        "config": plain({**kept, "peft_type": fields["peft_type"]}),
    }
