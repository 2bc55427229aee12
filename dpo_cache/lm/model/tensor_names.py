"""Which tensors of a checkpoint its model loads, and under which names transformers saves them.

A model without weights (on the meta device) knows it: nothing is loaded. Tensors that it does not load are
not part of an identity, nor are those of towers for images and sound, which rows of text never reach. The
answer is remembered, so that a later run imports no model code.

Where transformers cannot make the model without weights, and for quantized checkpoints and remote code, every
tensor counts under the name that it has in the files.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedConfig

from dpo_cache.lm.model.memo import read_memo, write_memo
from dpo_cache.lm.model.tensor_digest import TensorNames, tensor_names_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Errors of transformers for a config that makes no model, or none without weights
FAILURES = (
    ImportError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    OSError,
    ArithmeticError,
    AssertionError,
)


def find_tensor_names(config: PreTrainedConfig, files: list[Path]) -> TensorNames:
    """How the model of this config names the tensors in the files."""
    if getattr(config, "quantization_config", None) is not None:
        return TensorNames()
    found = tensor_names_in(files)
    key = json.dumps([found, config.to_dict(), type(config).__name__], default=str, sort_keys=True)
    stamp = [transformers.__version__, hashlib.sha256(key.encode()).hexdigest()]
    memo = f"names {files[0].parent.resolve()} {stamp[1]}"
    known = _parsed(read_memo(memo, stamp))
    if known is None:
        try:
            known = _ask_model(make_empty(config), found)
        except FAILURES:
            return TensorNames()
        write_memo(memo, stamp, _plain(known))
    return known


def make_empty(config: PreTrainedConfig, **code: Any) -> PreTrainedModel:
    """The causal LM of this config without weights, on the meta device.

    By transformers' code, unless `code` has `trust_remote_code`, and `code_revision` if needed.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, **{"trust_remote_code": False, **code}
        )


def _ask_model(model: PreTrainedModel, found: list[str]) -> TensorNames:
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    saved = revert_weight_conversion(model, dict(state))
    saved_name = {id(tensor): name for name, tensor in saved.items()}
    loaded_as = _loaded_names(model, state, found)
    for_text = _names_for_text(model)
    renamed, unused = {}, set()
    for name in found:
        target = loaded_as[name]
        if target not in state or not for_text(target):
            unused.add(name)
            continue
        if name not in saved and id(state[target]) in saved_name:
            renamed[name] = saved_name[id(state[target])]
    tied = {
        saved_name.get(id(state[name]), name): saved_name.get(id(state[source]), source)
        for name, source in getattr(model, "all_tied_weights_keys", {}).items()
        if name in state and source in state
    }
    return TensorNames(renamed, frozenset(unused), tied)


def _loaded_names(model: PreTrainedModel, state: dict[str, torch.Tensor], found: list[str]) -> dict[str, str]:
    """Name in the files -> name in the model, as `from_pretrained` finds it; not in `state` if not loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping, prefix = get_model_conversion_mapping(model), model.base_model_prefix
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names = {}
    for name in sorted(found, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, _ = rename_source_key(name, [], [], prefix, state)
        names[name] = renamed
    return names


def _names_for_text(model: PreTrainedModel) -> Any:
    """A function of a tensor's name: whether a row of text can reach it.

    In a model of text and something else, these are the tensors of its language model and its head.
    """
    if model.config.get_text_config() is model.config:
        return lambda _: True
    ends = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    parts = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    if len(parts) < 2 or "" in parts:
        return lambda _: True
    return lambda name: any(name.startswith(f"{part}.") for part in parts)


def _plain(names: TensorNames) -> dict[str, Any]:
    return {
        "renamed": names.renamed,
        "unused": sorted(names.unused),
        "tied": names.tied,
    }


def _parsed(content: dict[str, Any]) -> TensorNames | None:
    """The names of a memo; None where it holds none."""
    renamed, tied, unused = (content.get(key) for key in ("renamed", "tied", "unused"))
    if not (isinstance(renamed, dict) and isinstance(tied, dict) and isinstance(unused, list)):
        return None
    texts = [*renamed, *renamed.values(), *tied, *tied.values(), *unused]
    if not all(isinstance(text, str) for text in texts):
        return None
    return TensorNames(renamed, frozenset(unused), tied)
