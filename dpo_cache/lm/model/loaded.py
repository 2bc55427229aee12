"""Identify a model that is loaded already: as its checkpoint, if it is unchanged, or by its own tensors.

Its tensors are compared one by one with those in the checkpoint's files, cast to the dtype that the model
has; so a model that was trained, merged, quantized or built by hand is never taken for its checkpoint. The
identity of such a model has `"weights_of": "memory"`, and `weights` is the sha256 over its tensors in memory,
so that it is never that of a checkpoint. The code of a model is not compared, in memory as on disk.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.model.identity import (
    checkpoint_files,
    computing_fields,
    identity_without_weights,
    reference_identity,
)
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.quantization import is_quantized


def identify_loaded(
    model: PreTrainedModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[dict[str, Any], str | None]:
    """The model's identity, and why it is not that of the checkpoint it was loaded from; None if it is.

    Raises `ModelError` for a model whose weights are not in memory, or that has an adapter in it.
    """
    location = model.name_or_path or ""
    name = location or type(model).__name__
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ModelError(f"{name}: some of its weights are not in memory.\nLoad it whole, on one device.")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ModelError(
            f"{name}: it has an adapter in it, which cannot be identified.\n"
            "Merge the adapter (peft), or give the folder of the adapter."
        )
    try:
        difference = _find_difference(model, location, revision, trust_remote_code)
    except ModelError as error:
        difference = first_line(error)
    if difference is None:
        return reference_identity(location, model.config, model.dtype, revision=revision), None
    weights = {"weights": _digest_tensors(model), "weights_of": "memory"}
    identity = {**weights, **identity_without_weights(model.config, model.dtype)}
    return identity, difference


def _find_difference(
    model: PreTrainedModel, location: str, revision: str | None, trust_remote_code: bool
) -> str | None:
    """The first difference between the model and its checkpoint, in words; None if there is none."""
    if not location:
        return "it names no checkpoint"
    if is_quantized(model):
        return "its weights are quantized"
    config = load_config(location, revision=revision, trust_remote_code=trust_remote_code)
    if computing_fields(model.config) != computing_fields(config):
        return "its config was changed"
    files = checkpoint_files(location, revision=revision)
    return _structure_difference(model) or _tensor_difference(model, files)


def _structure_difference(model: PreTrainedModel) -> str | None:
    """Compare tensors' shapes, and buffers that are in no file, with a fresh model of the same config."""
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        fresh = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    shapes, expected = ({name: t.shape for name, t in one.state_dict().items()} for one in (model, fresh))
    if shapes != expected:
        changed = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        return f"its tensor {changed[0]} was added, removed or has another shape"
    buffers = dict(model.named_buffers())
    for name, buffer in fresh.named_buffers():
        if name not in expected and not buffer.is_meta and not _equal(buffer, buffers.get(name)):
            return f"its buffer {name} was changed"
    return None


def _tensor_difference(model: PreTrainedModel, files: list[Path]) -> str | None:
    """Compare the model's tensors with those in the files, one in memory at a time."""
    # by the names, and in the shapes, that they have in a checkpoint
    live: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    for name, tensor in model.named_parameters():
        if tensor.dtype != (torch.float32 if _loads_in_float32(model, name) else model.dtype):
            return f"its tensor {name} has another dtype than the model"
    found: set[int] = set()  # addresses: tied weights are in the files once
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in set(file.keys()) & live.keys():
                    if not _equal(file.get_tensor(name).to(live[name].dtype), live[name]):
                        return f"its tensor {name} was changed"
                    found.add(live[name].data_ptr())
        except SafetensorError as error:
            raise ModelError(f"{path}: not a whole safetensors file ({error}).") from error
    unknown = sorted(name for name, tensor in live.items() if tensor.data_ptr() not in found)
    return f"its tensor {unknown[0]} is not in the checkpoint" if unknown else None


def _loads_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers keeps this tensor in float32 in a model of 16 bits."""
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if model.dtype == torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}
    return any(f".{part}." in f".{name}." for part in kept)


def _equal(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one.cpu(), other.detach().cpu())


def _digest_tensors(model: PreTrainedModel) -> str:
    """Hex sha256 over the tensors in memory, including buffers that no checkpoint has."""
    lines, tensors = [], {**dict(model.named_buffers()), **model.state_dict()}
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(values.data).hexdigest()
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {digest}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
