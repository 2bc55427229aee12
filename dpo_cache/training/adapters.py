"""The adapter of a run: deciding whether one is trained, and putting it into the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from dpo_cache.errors import TrainingError
from dpo_cache.lm.model.adapter import (
    CheckpointLocation,
    add_adapter,
    check_mergeable,
    lora_config,
    read_adapter_config,
)
from dpo_cache.lm.model.adapter_weights import load_adapter
from dpo_cache.log import Log
from dpo_cache.options.train import TrainOptions
from dpo_cache.training.loaded import adds_adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def has_adapter(options: TrainOptions, parts: CheckpointLocation, location: str, *, is_resumed: bool) -> bool:
    """Return whether an adapter is trained. Raises `TrainingError` for options that need one or add a second
    one.
    """
    is_new, is_saved = adds_adapter(options), parts.adapter is not None
    if is_new and is_saved and not is_resumed:
        raise TrainingError(
            f"{location} is an adapter already, which would be trained on.\n"
            "Leave `lora_r` and `peft_config` out, or merge it into its base first (peft: "
            "`merge_and_unload`)."
        )
    for flag, is_given in (
        ("`merge_adapter`", options.merge_adapter),
        (f"`quantize` {options.quantize}", options.quantize != "none"),
    ):
        if is_given and not (is_new or is_saved):
            raise TrainingError(
                f"{flag} needs an adapter, and all weights of {location} would be trained.\n"
                "Add `lora_r` 16, for example."
            )
    return is_new or is_saved


def new_adapter_config(options: TrainOptions, parts: CheckpointLocation) -> PeftConfig:
    """The config of the fresh adapter that the options add. Raises `OptionError`."""
    if options.lora_r is not None:
        config = lora_config(options.lora_r, options.lora_alpha, options.lora_targets)
    else:
        config = read_adapter_config(str(options.peft_config))
    config.revision = parts.base_revision
    return config


def put_adapter(
    options: TrainOptions, model: PreTrainedModel, parts: CheckpointLocation, log: Log
) -> PeftModel:
    """Put the saved adapter into the model, or a fresh one."""
    if parts.adapter is not None:
        adapted = load_adapter(model, parts.adapter, is_trainable=True)
    else:
        adapted = add_adapter(model, new_adapter_config(options, parts), seed=options.seed, log=log)
    if options.merge_adapter:
        check_mergeable(adapted)
    return adapted
