"""A checkpoint -> a causal LM that is known to be whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.model.adapter import CheckpointLocation, load_adapter, locate_checkpoint
from dpo_cache.lm.model.quantization import check_quantizable, is_quantized, loading_config, prepare_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_config(
    location: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The model's config, without its weights; of an adapter, its base's. Raises `ModelError`."""
    return _config_of(locate_checkpoint(location, revision), location, trust_remote_code)


def _config_of(parts: CheckpointLocation, location: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a base that is found; errors name `location`, which was asked for."""
    try:
        return AutoConfig.from_pretrained(
            parts.base, revision=parts.base_revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"{location}: no model can be loaded from it ({first_line(error)}).\n"
            "Give a local folder with config.json, or a Hub id."
        ) from error


def check_causal(config: PreTrainedConfig, location: str) -> None:
    """Raise `ModelError` unless the config, and the checkpoint it came with, are of a causal LM."""
    names = config.architectures or []
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise ModelError(
            f"{location}: its architecture is {', '.join(names)}, which has no causal LM head.\n"
            "Give a model whose architecture ends in ForCausalLM or LMHeadModel."
        )


def load_model(
    location: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The causal LM in eval mode on the device, of an adapter its base with the adapter in it. Raises
    `ModelError`, also where a weight is missing.

    `quantize` 8bit or 4bit holds the linear layers of the decoder in so many bits, frozen; what is left has
    `dtype`. 4-bit weights are multiplied in `compute_dtype` (default: `dtype`).

    Only safetensors are read: a pickled checkpoint can run code. Eval mode is kept while training too:
    the reference is scored without dropout, so the policy is trained without it.
    """
    parts = locate_checkpoint(location, revision)
    model = load_base(
        parts,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        compute_dtype=compute_dtype,
    )
    if parts.adapter is not None:
        load_adapter(model, parts.adapter)
    return model


def load_base(
    parts: CheckpointLocation,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    quantize: str = "none",
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """See `load_model`: the weights alone, without an adapter over them."""
    location, revision = parts.base, parts.base_revision
    config = _config_of(parts, location, trust_remote_code)
    check_causal(config, location)
    check_quantizable(config, location, quantize)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if quantize != "none":
        options |= {"quantization_config": loading_config(quantize, compute_dtype or dtype)}
    if quantize != "none" or getattr(config, "quantization_config", None) is not None:
        options |= {"device_map": {"": device}}  # quantized where it is to stay: such weights are not moved
    bars_shown = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    # what its report says in many lines, the check below says in one
    transformers_logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{location}: no causal LM can be loaded from it ({first_line(error)}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars_shown:
            transformers_logging.enable_progress_bar()
    model, report = loaded
    lacking = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{location}: {len(lacking)} weights are not in the checkpoint or have another shape, first "
            f"{lacking[0]}.\n"
            "They would be random. Give a complete checkpoint of a causal LM."
        )
    if is_quantized(model):
        prepare_layers(model)
        return model.eval()
    return model.to(device).eval()
