"""The tensors of a checkpoint that its model loads, and the names under which transformers saves them.

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

from dpo_cache.lm.model.architecture import CAUSAL, whole_name
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
    memo = f"names of whole {files[0].parent.resolve()} {stamp[1]}"
    known = _parsed(read_memo(memo, stamp))
    if known is None:
        try:
            known = names_in_model(make_empty(config), found)
            if known is None and whole_name(config) is not None:
                known = names_in_model(_make_whole(config), found)
        except FAILURES:
            return TensorNames()
        known = known or TensorNames(unused=frozenset(found))
        write_memo(memo, stamp, _plain(known))
    return known


def make_empty(config: PreTrainedConfig, **code: Any) -> PreTrainedModel:
    """The causal LM of this config without weights, on the meta device; or a language model less its towers,
    where transformers has no causal LM for it.

    By transformers' code, unless `code` has `trust_remote_code`, and `code_revision` if needed.
    """
    from transformers import AutoModelForCausalLM

    if whole_name(config) is not None and config.model_type not in CAUSAL:
        return _make_whole(config)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, **{"trust_remote_code": False, **code}
        )


def make_empty_for(config: PreTrainedConfig, adapter_file: Path, **code: Any) -> PreTrainedModel:
    """The same for an adapter, in the class that has its modules."""
    from dpo_cache.lm.model.towers import loading_class, make_empty_whole

    kind = loading_class(config, adapter_file)
    return make_empty(config, **code) if kind is None else make_empty_whole(kind, config)


def _make_whole(config: PreTrainedConfig) -> PreTrainedModel:
    from dpo_cache.lm.model.towers import loading_class, make_empty_whole

    kind = loading_class(config)
    assert kind is not None
    return make_empty_whole(kind, config)


def names_in_model(model: PreTrainedModel, found: list[str]) -> TensorNames | None:
    """The names by a model; None if it is another part of the checkpoint, which has none of its tensors."""
    from transformers.core_model_loading import revert_weight_conversion

    from dpo_cache.lm.model.towers import text_filter

    state = model.state_dict()
    saved = revert_weight_conversion(model, dict(state))
    saved_name = {id(tensor): name for name, tensor in saved.items()}
    loaded_as = loaded_names(model, state, found)
    if not state.keys() & {*loaded_as.values()}:
        return None
    for_text = text_filter(model)
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


def loaded_names(model: PreTrainedModel, state: dict[str, torch.Tensor], found: list[str]) -> dict[str, str]:
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
