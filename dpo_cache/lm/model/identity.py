"""The identity of a reference: the canonical description whose sha256 names it.

    {"scoring": 1, "weights": <hex>, "config": {...}, "dtype": "float32"}
    {..., "quantization": {...}}    for quantized weights: the settings in the checkpoint, or of `quantize`
    {..., "adapter": {...}}         for weights with an adapter, see `adapter_identity.py`
    {..., "code": <hex>}            where the checkpoint's own code makes the model, see `code_digest.py`

`weights` is a sha256 over all tensors that the model loads (`tensor_digest.py`): it does not depend on how a
checkpoint is split into files. `config` holds the fields that differ from the defaults of the model's class,
less those that cannot change a log-prob (`config_fields.py`). A model's name, revision, library versions,
device and attention kernel are provenance: recorded with the identity, not hashed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from dpo_cache.lm.model.adapter import CheckpointLocation, locate_checkpoint
from dpo_cache.lm.model.adapter_identity import adapter_identity
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.code_digest import remote_code_digest, uses_remote_code
from dpo_cache.lm.model.config_fields import computing_fields
from dpo_cache.lm.model.former_identity import former_identity
from dpo_cache.lm.model.quantization import check_quantizable
from dpo_cache.lm.model.tensor_digest import weights_digest
from dpo_cache.lm.model.tensor_names import find_tensor_names
from dpo_cache.lm.model.unchanged import commit_of
from dpo_cache.log import phase
from dpo_cache.types import QUANTIZATION_FIELDS

SCORING_VERSION = 1  # raised when the same model and ids would get other stored values


@phase("identifying the model")
def reference_identity(
    location: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    quantize: str = "none",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The identity of the model at a local folder or Hub id, from its files. Raises `ModelError`.

    `quantize` is that of `load_model`: none, 8bit or 4bit.
    """
    check_quantizable(config, location, quantize)
    parts = locate_checkpoint(location, revision)
    identity = identity_without_weights(config, dtype)
    identity["weights"] = _base_digest(parts, config, trust_remote_code)
    if quantize != "none":
        identity["quantization"] = dict(QUANTIZATION_FIELDS[quantize])
    if uses_remote_code(config, trust_remote_code):
        identity["code"] = remote_code_digest(parts.base, parts.base_revision, config)
    if parts.adapter is not None:
        identity["adapter"] = adapter_identity(parts.adapter, config, parts.base, identity.get("code"))
    return identity


def identity_as_recorded(
    recorded: Mapping[str, Any],
    location: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    quantize: str = "none",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """The identity of the model, in its former form if a recorded one is that: they are of one model then."""
    if recorded:
        former = former_identity(locate_checkpoint(location, revision), config, dtype, quantize)
        if recorded == former:
            return former
    return reference_identity(
        location, config, dtype, revision=revision, quantize=quantize, trust_remote_code=trust_remote_code
    )


def identity_without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The entries of an identity that follow from the config and the dtype."""
    identity = {
        "scoring": SCORING_VERSION,
        "config": computing_fields(config),
        "dtype": str(dtype).removeprefix("torch."),
    }
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        is_plain = isinstance(quantization, dict)
        identity["quantization"] = dict(quantization) if is_plain else quantization.to_dict()
    return identity


def provenance(
    location: str, *, revision: str | None, device: torch.device, attention: str, tokenizer: str
) -> dict[str, Any]:
    """The source of the reference and the machine that computed it: recorded, not hashed."""
    return {
        "model": os.path.abspath(location) if os.path.isdir(location) else location,
        "revision": commit_of(location, revision),
        "tokenizer": os.path.abspath(tokenizer) if os.path.isdir(tokenizer) else tokenizer,
        "device": torch.cuda.get_device_name(device) if _is_here(device) else device.type,
        "attention": attention,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _is_here(device: torch.device) -> bool:
    """Return whether it is a CUDA device of this machine; other machines may score."""
    return device.type == "cuda" and torch.cuda.is_available()


def _base_digest(parts: CheckpointLocation, config: PreTrainedConfig, trust_remote_code: bool) -> str:
    """The digest of the base's weights.

    Where they are saved quantized, or loaded by code of the checkpoint, all tensors count as they are stored.
    """
    weights_file = getattr(config, "transformers_weights", None)
    files = checkpoint_files(parts.base, revision=parts.base_revision, weights_file=weights_file)
    is_saved_quantized = getattr(config, "quantization_config", None) is not None
    if is_saved_quantized or uses_remote_code(config, trust_remote_code):
        return weights_digest(files)
    return weights_digest(files, find_tensor_names(config, files))
