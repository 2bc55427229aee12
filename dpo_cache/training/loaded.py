"""A policy that is already in memory, and is trained in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import ModelError, OptionError, kind_of
from dpo_cache.lm.device import check_one_device
from dpo_cache.lm.model.adapter import CheckpointLocation
from dpo_cache.lm.model.architecture import check_causal
from dpo_cache.lm.model.load import load_base, load_config
from dpo_cache.lm.model.loaded import identify_loaded
from dpo_cache.lm.model.quantization import is_quantized
from dpo_cache.lm.model.towers import text_filter
from dpo_cache.options.train import TrainOptions


@dataclass(frozen=True)
class LoadedPolicy:
    """A model in memory, its name in options and reports, and its tokenizer, if one is given."""

    model: PreTrainedModel
    name: str
    tokenizer: PreTrainedTokenizerBase | None

    def bytes_on(self, device: torch.device) -> int:
        """Bytes of its weights that are on the device."""
        return sum(one.nbytes for one in self.model.parameters() if one.device.type == device.type)

    def identify(
        self,
        dtype: torch.dtype,
        recorded: Mapping[str, Any],
        scored_in: torch.dtype,
        *,
        trust_remote_code: bool,
    ) -> dict[str, Any]:
        """The model's identity, to compare with the `recorded` one of a reference in the dtype `scored_in`:
        that of its checkpoint only if its weights are the checkpoint's.
        """
        identity, difference = identify_loaded(
            self.model, dtype=scored_in, recorded=recorded, trust_remote_code=trust_remote_code
        )
        if difference is None and self._was_rounded(dtype, trust_remote_code=trust_remote_code):
            rounded = str(self.model.dtype).removeprefix("torch.")
            return {**identity, "weights": f"{identity['weights']}, rounded to {rounded}"}
        return identity

    def _was_rounded(self, dtype: torch.dtype, *, trust_remote_code: bool) -> bool:
        """Return whether loading the model lost bits of its checkpoint that this dtype would keep."""
        saved: Any = load_config(self.name, trust_remote_code=trust_remote_code).dtype or torch.float32
        lowest = min((saved, dtype), key=lambda one: torch.finfo(one).bits)
        return torch.promote_types(self.model.dtype, lowest) != self.model.dtype

    def locate(self, options: TrainOptions, checkpoint: Path | None) -> CheckpointLocation:
        """The model, with a resumed run's adapter if it has one; otherwise the checkpoint of a resumed run.

        Raises `OptionError` for options that only apply to loading a model.
        """
        if options.quantize != "none":
            raise OptionError(
                f"quantize {options.quantize}: the model is in memory already.\n"
                "Give its path or Hub id instead."
            )
        if checkpoint is None or adds_adapter(options):
            return CheckpointLocation(self.name, None, str(checkpoint) if checkpoint else None)
        return CheckpointLocation(str(checkpoint), None)

    def place(self, dtype: torch.dtype, device: torch.device, checkpoint: Path | None) -> PreTrainedModel:
        """The model on the device and in the dtype, with the weights of a checkpoint if one is given."""
        self.model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        if checkpoint is not None:
            saved = load_base(CheckpointLocation(str(checkpoint), None), dtype=dtype, device=device)
            # a checkpoint is loaded without its towers, which were not trained
            found = self.model.load_state_dict(saved.state_dict(), strict=False)
            is_for_text = text_filter(self.model)
            assert not found.unexpected_keys and not any(map(is_for_text, found.missing_keys))
        return self.model


def take_loaded(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> LoadedPolicy | None:
    """The model, if it is in memory and not a path or None. Raises `ModelError` or `OptionError`."""
    if model is None or isinstance(model, (str, os.PathLike)):
        if tokenizer is not None:
            raise OptionError("tokenizer is used only with a model that is loaded already.\nLeave it out.")
        return None
    if not isinstance(model, PreTrainedModel):
        raise OptionError(
            f"{kind_of(model)} cannot be trained.\n"
            "Give a causal LM of transformers, or the path or Hub id of one; for an adapter, its folder."
        )
    name = model.name_or_path or f"{type(model).__name__} in memory"
    check_one_device(model)
    check_causal(model.config, name)
    if is_quantized(model):
        raise ModelError(
            f"{name}: its weights are quantized.\nGive its path or Hub id instead, and the option quantize."
        )
    return LoadedPolicy(model, name, tokenizer)


def adds_adapter(options: TrainOptions) -> bool:
    """Return whether the options put a fresh adapter into the model."""
    return options.lora_r is not None or options.peft_config is not None
