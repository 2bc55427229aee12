"""A saved adapter -> in its model, every tensor in its place; or an error that names those without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.nn import Module

from dpo_cache.errors import ModelError
from dpo_cache.lm.layerwise.adapting import adapting
from dpo_cache.lm.model.adapter import (
    CHANGES_BASE,
    WEIGHTS_FILE,
    check_suited,
    import_peft,
    read_config,
    weights_file,
    without_library_warnings,
)
from dpo_cache.lm.model.tensor_digest import tensor_shapes
from dpo_cache.lm.model.unchanged import check_unchanged

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SHOWN = 4  # tensors, or lines of an error of another library, in one message

# Errors of PEFT for an adapter that does not fit its base
MISFITS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)

# Parts of the names of parameters that layers share, and that are in a file only once
SHARED = (".tinylora_v.", "vblora_vector_bank", ".unilora_theta_d.")
PLACES = "shira_indices"  # not a parameter: set_peft_model_state_dict does not report it


def load_adapter(model: PreTrainedModel, folder: str, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter into the model, as `add_adapter` does a fresh one.

    A base whose vocabulary has another size than the one that the adapter was trained on is resized to it.
    Raises `ModelError` for an adapter that does not fit: if tensors are missing or left over, it names them.
    """
    try:
        fit_vocabulary(model, folder)
        with adapting(model):
            adapted = put_adapter(model, folder, is_trainable=is_trainable).eval()
    except MISFITS as error:
        raise ModelError(
            f"{folder}: the adapter does not fit {type(model).__name__}: {_in_full(error)}\n"
            "Give the base that it was trained on as base_model_name_or_path in adapter_config.json."
        ) from error
    check_unchanged()
    return adapted


def restore_adapter(adapted: PeftModel, folder: str) -> None:
    """Give the adapter the weights that were saved in the folder."""
    peft = import_peft()
    peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(folder, device="cpu"))


def put_adapter(
    model: PreTrainedModel, folder: str, *, is_trainable: bool = False, is_empty: bool = False
) -> PeftModel:
    """The model with the adapter in it; on the meta device if it `is_empty`, as its model must be.

    Raises `ModelError` for tensors that are missing or left over, and what PEFT raises otherwise.
    """
    peft, config = import_peft(), read_config(folder)
    check_suited(config)
    config.inference_mode = not is_trainable
    make = peft.PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else peft.PeftModel
    with without_library_warnings(), torch.random.fork_rng(devices=[]):
        if is_empty:
            warnings.simplefilter("ignore")  # the same warnings come when the adapter is loaded
        adapted = make(model, config, "default", low_cpu_mem_usage=is_empty)
        tensors = (
            {name: torch.empty(shape, device="meta") for name, shape in _shapes(folder).items()}
            if is_empty
            else peft.load_peft_weights(folder, device="cpu")
        )
        _check_wrapped(adapted, tensors.keys(), folder)
        shared = _shared_names(adapted)
        found = peft.set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=is_empty)
    prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [
        name
        for name in found.missing_keys
        if prefix in name and ".default" in name and not any(part in name for part in SHARED)
    ]
    absent = {*found.missing_keys}
    missing += [min(names, key=len) for names in shared if names <= absent]
    missing += _missing_indices(adapted, tensors.keys())
    unexpected = set(found.unexpected_keys) - _saved_names(adapted, with_base=True)
    _raise_for(folder, type(model).__name__, missing, sorted(unexpected))
    if _changes_base(adapted, folder):
        setattr(adapted, CHANGES_BASE, True)
    return adapted


def _shared_names(adapted: PeftModel) -> list[set[str]]:
    """The names of each parameter that layers share: one of them has to be in the file."""
    names: dict[str, set[str]] = {}
    for name, _ in adapted.named_parameters(remove_duplicate=False):
        for part in SHARED:
            _, found, after = name.partition(part)
            if found:
                names.setdefault(found + after, set()).add(name)
    return list(names.values())


def _missing_indices(adapted: PeftModel, found: Iterable[str]) -> list[str]:
    """The names of tables of places in a matrix (SHiRA) that the file lacks: PEFT would choose others."""
    names = set(found)
    expected = [f"{name}.{PLACES}" for name, module in adapted.named_modules() if hasattr(module, PLACES)]
    return [name for name in expected if name not in names]


def _changes_base(adapted: PeftModel, folder: str) -> bool:
    """Return whether the file holds weights of the base, such as resized embeddings: always in use."""
    return bool(_shapes(folder).keys() - _saved_names(adapted, with_base=False))


def _saved_names(adapted: PeftModel, *, with_base: bool) -> set[str]:
    """The names of the tensors that PEFT saves of this adapter, with the ends of the base or not."""
    with without_library_warnings():
        return set(import_peft().get_peft_model_state_dict(adapted, save_embedding_layers=with_base))


def fit_vocabulary(model: PreTrainedModel, folder: str) -> None:
    """Resize the embeddings and the head of the base to the number of tokens that the adapter has rows for.

    Raises `ModelError` where the adapter lacks new rows of one of them: they would be random.
    """
    shapes, ends = _shapes(folder), _vocabulary_ends(model)
    whole = {name: shapes[key][0] for name in ends for key in _keys_of_whole(name) if key in shapes}
    partial = [
        shapes[key][axis]
        for name in ends
        for key, axis in (
            (f"base_model.model.{name}.lora_embedding_A", 1),
            (f"base_model.model.{name}.lora_B.weight", 0),
        )
        if key in shapes
    ]
    sizes = {*whole.values(), *partial}
    before = vocabulary_size(model)
    if sizes <= {before}:
        return
    if len(sizes) > 1:
        raise ModelError(
            f"{folder}: its tensors are of vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens, "
            f"and its base has {before}.\nSave the adapter with its embeddings and its head (peft: "
            "`save_embedding_layers=True`)."
        )
    size = sizes.pop()
    lacking = [name for name in ends if name not in whole]
    if size > before and lacking and not _are_tied(model, whole.keys(), shapes):
        raise ModelError(
            f"{folder}: was trained on a vocabulary of {size} tokens, its base has {before}, and the adapter "
            f"has no rows of {' and '.join(lacking)} for the new ones.\n"
            "Save the adapter with its embeddings and its head (peft: `save_embedding_layers=True`)."
        )
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(size, mean_resizing=False)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def may_resize(folder: str, size: int) -> bool:
    """Return whether the adapter may be of a vocabulary of another size: it has a matrix that is not
    low-rank.
    """
    return any(
        len(shape) == 2 and size not in shape and ("lora_" not in name or "embedding" in name)
        for name, shape in _shapes(folder).items()
    )


def describe_modules(adapted: PeftModel) -> list[list[Any]]:
    """For each module that gets the adapter: name, effective rank and scaling (None without), parameter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    lines: list[list[Any]] = []
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            rank, scaling = (_entry(getattr(module, field, None)) for field in ("r", "scaling"))
            lines.append([name, rank, scaling, getattr(module, "parameter_name", None)])
        elif hasattr(module, "adapter_state_dict_load_map"):
            lines.append([name, None, None, type(module).__name__])
    return sorted(lines, key=lambda line: str(line[0]))


def _entry(values: Any) -> float | None:
    value = values.get("default") if isinstance(values, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _check_wrapped(adapted: PeftModel, found: Iterable[str], folder: str) -> None:
    """Raise `ModelError` for whole modules of the adapter (`modules_to_save`) that are not in its file."""
    names = set(found)
    missing = [
        f"{name}.{key}"
        for name, module in adapted.named_modules()
        if hasattr(module, "adapter_state_dict_load_map")
        for key in module.adapter_state_dict_load_map("default")
        if f"{name}.{key}" not in names
    ]
    _raise_for(folder, type(adapted.get_base_model()).__name__, missing, [])


def _raise_for(folder: str, model: str, missing: list[str], unexpected: list[str]) -> None:
    """Raise `ModelError` if there are any such tensors."""
    parts = [
        f"{problem}: {_listed(names)}"
        for names, problem in (
            (missing, f"{len(missing)} of the adapter's tensors missing, which would be random"),
            (unexpected, f"{len(unexpected)} without a place in {model} under its adapter_config.json"),
        )
        if names
    ]
    if parts:
        raise ModelError(
            f"{Path(folder, WEIGHTS_FILE)}: {'; '.join(parts)}.\n"
            "Save the adapter again, with the adapter_config.json that it was trained with."
        )


def _listed(names: list[str]) -> str:
    shown = [name.replace(".default", "") for name in sorted(names)]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _in_full(error: BaseException) -> str:
    """All that another library's error reports, in one line: its first line may hold nothing of it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    more = f" (and {len(lines) - SHOWN} more lines)" if len(lines) > SHOWN else ""
    return " ".join(lines[:SHOWN]) + more


def _shapes(folder: str) -> dict[str, list[int]]:
    return tensor_shapes([weights_file(folder)])


def _vocabulary_ends(model: PreTrainedModel) -> dict[str, Module]:
    """Name -> embeddings and head, which have a row for each token."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is end for end in ends)}


def _keys_of_whole(name: str) -> list[str]:
    """The names that all rows of a module have in an adapter's file."""
    return [f"base_model.model.{name}{part}.weight" for part in ("", ".base_layer", ".modules_to_save")]


def _are_tied(model: PreTrainedModel, whole: Iterable[str], shapes: dict[str, list[int]]) -> bool:
    """Return whether both ends have the same rows: they share a weight, and it is not wrapped."""
    is_tied = bool(model.config.get_text_config().tie_word_embeddings)
    plain_keys = [key for name in whole for key in _keys_of_whole(name)[1:2] if key in shapes]
    return is_tied and bool(plain_keys)
