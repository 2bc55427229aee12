"""Checks that need only a model without weights, so that their errors come before the weights are loaded.

The model is made from its config, on the meta device, and gets the adapter of the run. Conditions that it
cannot show, such as those of an adapter that needs values of weights, are checked with the loaded model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.lm.device import choose_device
from dpo_cache.lm.model.adapter import (
    CheckpointLocation,
    add_adapter,
    check_mergeable,
    locate_checkpoint,
)
from dpo_cache.lm.model.code_digest import code_options
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.tensor_names import FAILURES, make_empty
from dpo_cache.lm.model.towers import loading_class, make_empty_whole
from dpo_cache.lm.routing import router_coefficient
from dpo_cache.options.train import TrainOptions
from dpo_cache.store import open_cache
from dpo_cache.training.adapters import has_adapter, new_adapter_config
from dpo_cache.training.output.disk import check_space, needed_bytes
from dpo_cache.training.placing import choose_precision, planned_method
from dpo_cache.training.start import find_start, trusts_code

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Errors of PEFT about the names and sizes of layers; others may be due to the missing values
CONCLUSIVE = (ValueError, LookupError, re.error)


def check_before_loading(
    options: TrainOptions,
    config: PreTrainedConfig,
    parts: CheckpointLocation,
    dtype: torch.dtype,
    *,
    is_adapted: bool,
    trusted: bool,
) -> None:
    """Raise `DpoCacheError` for options that do not fit a model of this config, or a disk that is too small
    for the result. `dtype` is that of the weights.
    """
    try:
        kind = loading_class(config)  # a checkpoint with towers has other names of layers
        code = code_options(parts.base, config, trusted)
        model = make_empty(config, **code) if kind is None else make_empty_whole(kind, config)
    except FAILURES:  # loading the model raises the error, or makes the model in another way
        return
    if options.router_aux_loss_coef:
        router_coefficient(model, options.router_aux_loss_coef)
    if options.sample:
        check_can_answer(model, options.sample)
    whole = sum(one.numel() for one in model.parameters()) * dtype.itemsize
    if not is_adapted:
        check_space(Path(options.output), needed_bytes(options, trained=whole, whole=whole))
    elif parts.adapter is None and (trained := _check_adapter(options, model, parts)) is not None:
        check_space(Path(options.output), needed_bytes(options, trained=trained, whole=whole))


def check_later_run(options: TrainOptions) -> None:
    """Raise the same errors for a run that another process will start, and `OptionError` for its device."""
    device, cache = choose_device(options.device), open_cache(options.cache)
    besides = cache.pairs(options.eval_pairs).name if options.eval_pairs else None
    pairs = cache.choose_pairs(options.pairs, "to train on", besides=besides)
    start = find_start(options, cache.read_reference(pairs.reference_id), lambda _: None, is_resumed=False)
    trusted, parts = trusts_code(options, start), locate_checkpoint(start.location, start.revision)
    config = load_config(parts.base, revision=parts.base_revision, trust_remote_code=trusted)
    is_adapted = has_adapter(options, parts, start.location, is_resumed=False)
    precision = choose_precision(options.precision, device)
    dtype = planned_method(options, precision, is_adapted=is_adapted).dtype
    check_before_loading(options, config, parts, dtype, is_adapted=is_adapted, trusted=trusted)


def check_can_answer(model: PreTrainedModel, num_prompts: int) -> None:
    """Raise `TrainingError` unless the model can write answers to `sample` prompts."""
    if not model.can_generate():
        raise TrainingError(
            f"`sample` {num_prompts}: {type(model).__name__} has no way to write answers.\n"
            "Leave `sample` out."
        )


def _check_adapter(options: TrainOptions, model: PreTrainedModel, parts: CheckpointLocation) -> int | None:
    """The bytes of a fresh adapter; None where the model without weights cannot take it."""
    try:
        adapted: Any = add_adapter(
            model, new_adapter_config(options, parts), seed=options.seed, log=lambda _: None
        )
    except OptionError as error:
        if error.__cause__ is None or isinstance(error.__cause__, CONCLUSIVE):
            raise
        return None
    if options.merge_adapter:
        check_mergeable(adapted)
    return sum(one.nbytes for one in model.parameters() if one.requires_grad)
