"""Change a loaded model to run faster or in less memory; every change is undone on leaving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.forest.attention import FOREST_ATTENTION, set_attention
from dpo_cache.lm.kernels.lora_linear import use_fast_lora
from dpo_cache.lm.kernels.onednn_linear import MIN_SPEEDUP, use_fast_linear
from dpo_cache.lm.memory.offload import offload_activations
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.patches import Patches
from dpo_cache.log import Log, log_remark


@dataclass
class Prepared:
    """How a model runs while it is prepared."""

    linear: str = "torch"  # the library that multiplies, see `use_fast_linear`
    recomputation: Recomputation | None = None  # None: the model is only run forward


_prepared: WeakKeyDictionary[torch.nn.Module, Prepared] = WeakKeyDictionary()


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Run the model without dropout, as the reference is scored; then restore the mode of every module."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextmanager
def prepared(
    model: PreTrainedModel,
    *,
    trains: bool = False,
    offloads: bool = False,
    min_speedup: float = MIN_SPEEDUP,
    linear: str | None = None,
    log: Log = log_remark,
) -> Iterator[Prepared]:
    """While open, the model's plain LoRA layers and linear layers run through faster functions.

    With `trains`, decoder layers can compute activations again in the backward pass, as `recomputation.mode`
    says; with `offloads`, they keep activations in host memory. `linear` decides which library multiplies,
    instead of a measurement, see `use_fast_linear`. A model that is prepared already keeps its changes; the
    block adds the missing ones, and undoes only these. A model that was switched to forest attention gets its
    original attention back.
    """
    patches, before = Patches(), _prepared.get(model)
    now = Prepared() if before is None else Prepared(before.linear, before.recomputation)
    original = model.config._attn_implementation
    try:
        _prepared[model] = now
        if before is None:
            if any("lora_" in name for name, _ in model.named_parameters()):
                use_fast_lora(model, patches)  # imports peft
            now.linear = use_fast_linear(
                model, patches, trains=trains, min_speedup=min_speedup, decided=linear
            )
        if trains and now.recomputation is None:
            now.recomputation = Recomputation(model, patches)
            if offloads:
                offload_activations(model, log, patches=patches)
        yield now
    finally:
        patches.undo()
        if before is None:
            del _prepared[model]
        else:
            _prepared[model] = before
        if model.config._attn_implementation == FOREST_ATTENTION != original:
            set_attention(model, original)
