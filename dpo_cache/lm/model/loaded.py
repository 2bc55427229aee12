"""Identify a model that is loaded already: as its checkpoint, if it is unchanged, or by its own tensors.

Its tensors are compared one by one with those in the checkpoint's files, cast to the dtype that the model
has; so a model that was trained, merged, quantized or built by hand is never taken for its checkpoint. The
identity of such a model has `"weights_of": "memory"`, and `weights` is the sha256 over its tensors in memory,
so that it is never that of a checkpoint. Classes that are not of a library have their source in the identity,
as `code`; if its modules are not those that its config describes, they are in the identity, as `modules`. A
model whose computation was changed from outside (`untouched.py`) cannot be identified.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dpo_cache.errors import ModelError, first_line
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.architecture import whole_name
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.class_code import class_code_digest, describe_callable
from dpo_cache.lm.model.code_digest import is_remote_code
from dpo_cache.lm.model.config_fields import computing_fields
from dpo_cache.lm.model.identity import identity_as_recorded, identity_without_weights
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.quantization import is_quantized
from dpo_cache.lm.model.tensor_digest import TensorNames, tensor_names_in
from dpo_cache.lm.model.tensor_names import find_tensor_names, names_in_model
from dpo_cache.lm.model.untouched import check_untouched, configs_of

INERT_ATTRIBUTES = {"training", "gradient_checkpointing", "name_or_path"}


def identify_loaded(
    model: PreTrainedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str | None]:
    """The model's identity, and why it is not that of the checkpoint it was loaded from; None if it is.

    As the checkpoint it is identified in `dtype` (default: the model's), in the former form if the `recorded`
    identity is that.

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
    check_untouched(model, name)
    has_own_code = type(model).__module__.startswith("transformers_modules.")
    try:
        difference = _find_difference(model, location, revision, trust_remote_code or has_own_code)
    except ModelError as error:
        difference = first_line(error)
    if difference is None:
        identity = identity_as_recorded(
            recorded or {},
            location,
            load_config(location, revision=revision, trust_remote_code=trust_remote_code or has_own_code),
            dtype or model.dtype,
            revision=revision,
            trust_remote_code=has_own_code,
        )
        return identity, None
    weights = {"weights": _digest_tensors(model), "weights_of": "memory"}
    identity = {**weights, **identity_without_weights(model.config, model.dtype)}
    if (code := class_code_digest({type(module) for module in model.modules()})) is not None:
        identity["code"] = code
    fresh = _fresh(model)
    if _modules_difference(model, fresh) is not None:
        described: Any = _describe_modules(model)
        settings, usual = _describe_settings(model), _describe_settings(fresh)
        if settings != usual:
            changed = {path: value for path, value in settings.items() if value != usual.get(path)}
            described = [described, changed]
        text = json.dumps(described, sort_keys=True)
        identity["modules"] = hashlib.sha256(text.encode()).hexdigest()
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
    parts = locate_checkpoint(location, revision)
    classes = {type(module) for module in model.modules()}
    code = class_code_digest(classes)
    if code is not None and not is_remote_code(type(model), classes, location, parts.base_revision, config):
        return "its code is not that of the checkpoint"
    weights_file = getattr(config, "transformers_weights", None)
    files = checkpoint_files(location, revision=parts.base_revision, weights_file=weights_file)
    names = TensorNames() if code else find_tensor_names(model.config, files)
    if whole_name(model.config) == type(model).__name__:  # the names are those of its part for text
        names = names_in_model(model, tensor_names_in(files)) or names
    return _structure_difference(model) or _tensor_difference(model, files, names)


def _structure_difference(model: PreTrainedModel) -> str | None:
    """Compare shapes, buffers that are in no file, and modules with a fresh model of the same config."""
    fresh = _fresh(model)
    shapes, expected = ({name: t.shape for name, t in one.state_dict().items()} for one in (model, fresh))
    if shapes != expected:
        changed = sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        return f"its tensor {changed[0]} was added, removed or has another shape"
    buffers = dict(model.named_buffers())
    for name, buffer in fresh.named_buffers():
        if name not in expected and not buffer.is_meta and not _equal(buffer, buffers.get(name)):
            return f"its buffer {name} was changed"
    return _modules_difference(model, fresh)


def _fresh(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config, without weights."""
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


def _modules_difference(model: PreTrainedModel, fresh: PreTrainedModel) -> str | None:
    """The first module whose class or settings are not those of the fresh model."""
    for describe in (_describe_modules, _describe_settings):
        found, expected = describe(model), describe(fresh)
        changed = [path for path in [*found, *expected] if found.get(path) != expected.get(path)]
        if changed:
            return f"its module {changed[0] or type(model).__name__} was changed"
    return None


def _describe_modules(model: PreTrainedModel) -> dict[str, list[Any]]:
    """Each module's class, and its numbers and texts, which can decide what it computes."""
    return {
        path: [
            f"{type(module).__module__}.{type(module).__qualname__}",
            {
                name: value
                for name, value in sorted(vars(module).items())
                if isinstance(value, (bool, int, float, str, tuple))
                and not name.startswith("_")
                and name not in INERT_ATTRIBUTES
            },
        ]
        for path, module in model.named_modules()
    }


def _describe_settings(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Each module's lists, functions, and configs that are not those of the model, which can decide, too."""
    shared = {id(one) for one in (model.config, *vars(model.config).values())}
    usual = [computing_fields(one) for one in configs_of(model) if id(one) in shared]
    others = {id(one): computing_fields(one) for one in configs_of(model) if id(one) not in shared}
    configs = {key: fields for key, fields in others.items() if fields not in usual}  # not mere copies
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for name, value in sorted(vars(module).items()):
            if id(value) in configs:
                found.setdefault(path, {})[name] = configs[id(value)]
            elif name.startswith("_") or name in INERT_ATTRIBUTES:
                continue
            elif isinstance(value, list | dict) and not hasattr(module, "_hf_hook"):
                found.setdefault(path, {})[name] = json.dumps(value, default=_name_of, sort_keys=True)
            elif isinstance(value, types.FunctionType | functools.partial):
                found.setdefault(path, {})[name] = describe_callable(value)
    return found


def _name_of(value: Any) -> str:
    """In place of what JSON has no word for."""
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _tensor_difference(model: PreTrainedModel, files: list[Path], names: TensorNames) -> str | None:
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
                for stored in file.keys():  # noqa: SIM118  (not a dict)
                    name = names.renamed.get(stored, stored)
                    if name not in live:
                        continue
                    if not _equal(file.get_tensor(stored).to(live[name].dtype), live[name]):
                        return f"its tensor {name} was changed"
                    found.add(live[name].data_ptr())
        except SafetensorError as error:
            raise ModelError(f"{path}: not a whole safetensors file ({error}).") from error
    unknown = sorted(name for name, tensor in live.items() if tensor.data_ptr() not in found)
    return f"its tensor {unknown[0]} is not in the checkpoint" if unknown else None


def _loads_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers keeps this tensor in float32 in a model of 16 bits."""
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
