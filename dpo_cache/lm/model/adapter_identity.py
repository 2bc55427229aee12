"""The identity of an adapter: its tensors, and what PEFT applies of them.

    {"weights": <hex>, "modules": 4, "applied": <hex>,
     "config": {"peft_type": "LORA", "r": 8, "scaling": 2.0, ...}}

`weights` is the sha256 over its tensors, in float32, in which PEFT holds them. `applied` is the sha256 over
the modules that get the adapter, each with its effective rank and scaling: which modules these are does not
follow from the tensors, and the lists and patterns in `adapter_config.json` that choose them can be written
in many ways. `config` holds the ranks and scalings, and the other fields that differ from PEFT's
defaults, which are pinned as those of models are (`config_fields.py`).

Both are found with a base without weights, before anything is loaded, and are remembered for later runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PreTrainedConfig

from dpo_cache.lm.model.adapter import CONFIG_FILE, kind_of, read_config, weights_file
from dpo_cache.lm.model.adapter_weights import describe_modules, fit_vocabulary, put_adapter
from dpo_cache.lm.model.code_digest import code_options
from dpo_cache.lm.model.config_fields import is_dropout, pinned_defaults, plain
from dpo_cache.lm.model.memo import read_memo, write_memo
from dpo_cache.lm.model.tensor_digest import float32_digest, tensor_shapes
from dpo_cache.lm.model.tensor_names import FAILURES, make_empty_for
from dpo_cache.lm.model.unchanged import note_files

if TYPE_CHECKING:
    from peft import PeftConfig

# Fields that cannot change the computation, or that only decide with what the adapter was trained.
# fmt: off
INERT_FIELDS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version",
        "rank_dropout_scale", "init_weights", "init_ia3_weights",
        "init_lora_weights", "megatron_config", "megatron_core", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "runtime_config", "peft_type",
    }
)
# fmt: on

# Fields that choose the modules
CHOOSING_FIELDS = frozenset(
    {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
)

# Fields that give each module its rank and its scaling
SCALING_FIELDS = frozenset({"r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})


def adapter_identity(folder: str, base: PreTrainedConfig, location: str, code: str | None) -> dict[str, Any]:
    """The part of a reference's identity that describes its adapter. Raises `ModelError` for tensors that do
    not fit.

    `location` is that of the base, and `code` the digest of the base's own code, if that makes it.
    """
    config = read_config(folder)
    applied, hidden, found = _find_applied(folder, base, config, location, code), INERT_FIELDS, {}
    if applied is not None:
        hidden |= CHOOSING_FIELDS
        found = {name: _one_or_all(applied.pop(name)) for name in ("r", "scaling")}
        if found["r"] and found["scaling"]:
            hidden |= SCALING_FIELDS
    fields = {name: value for name, value in counted_fields(config).items() if name not in hidden}
    fields |= {name: value for name, value in found.items() if value}
    return {
        "weights": float32_digest([weights_file(folder)]),
        **(applied or {}),
        "config": {**fields, "peft_type": kind_of(config)},
    }


def _one_or_all(values: list[float]) -> float | list[float]:
    """The value, if all modules have the same one."""
    return values[0] if len(values) == 1 else values


def counted_fields(config: PeftConfig) -> dict[str, Any]:
    """The fields that differ from the pinned defaults, JSON-ready, sets as sorted lists."""

    def fields_of(one: PeftConfig) -> dict[str, Any]:
        sets = {name: sorted(map(str, value)) for name, value in vars(one).items() if isinstance(value, set)}
        return plain({**one.to_dict(), **sets})

    kind, fields = kind_of(config), fields_of(config)
    defaults = fields_of(type(config)()) | pinned_defaults().get(f"adapter {kind}", {})
    return {
        name: value
        for name, value in fields.items()
        if value != defaults.get(name) and not is_dropout(name, value)
    }


def _find_applied(
    folder: str, base: PreTrainedConfig, config: PeftConfig, location: str, code: str | None
) -> dict[str, Any] | None:
    """The entries of an identity for the modules that PEFT puts the adapter into.

    None where that cannot be found without weights; then the fields that choose them count.
    """
    import peft

    note_files([Path(folder, CONFIG_FILE)])
    shapes = tensor_shapes([weights_file(folder)])
    key = json.dumps(
        [kind_of(config), counted_fields(config), base.to_dict(), shapes, code], default=str, sort_keys=True
    )
    stamp = [transformers.__version__, peft.__version__, hashlib.sha256(key.encode()).hexdigest()]
    memo = f"adapter {Path(folder).resolve()}"
    known = read_memo(memo, stamp)
    if known.keys() != {"modules", "applied", "r", "scaling"}:
        try:
            options = code_options(location, base, code is not None)
            model = make_empty_for(base, weights_file(folder), **options)
            fit_vocabulary(model, folder)
            lines = describe_modules(put_adapter(model, folder, is_empty=True))
        except FAILURES:
            return None
        known = {
            "modules": len(lines),
            "applied": hashlib.sha256(json.dumps(lines).encode()).hexdigest(),
            "r": sorted({int(line[1]) for line in lines if line[1] is not None}),
            "scaling": sorted({line[2] for line in lines if line[2] is not None}),
        }
        write_memo(memo, stamp, known)
    return known
