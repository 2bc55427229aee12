"""Counts for a deep model, extrapolated from counts for a few of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from dpo_cache.lm.memory.recompute import decoder_layers

FEW = (1, 2, 3)


def num_layers(config: PreTrainedConfig) -> int:
    """Layers of the model's decoder; 0 where the config names none."""
    return int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)


def with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """The config of the same model with its first layers only; lists with an entry for each layer are cut."""
    cut: Any = copy.deepcopy(config)
    text = cut.get_text_config()
    whole = num_layers(config)
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:number])
    text.num_hidden_layers = number
    return cut


def are_alike(model: PreTrainedModel) -> bool:
    """Return whether all decoder layers hold the same tensors."""
    found = {
        tuple((name, tuple(one.shape)) for name, one in layer.named_parameters())
        for layer in decoder_layers(model)
    }
    return len(found) == 1


def over_layers(
    count: Callable[[PreTrainedConfig], Sequence[int]], config: PreTrainedConfig, *, alike: bool
) -> int:
    """The largest peak of `count(config)`, which has one for each phase (`footprint.phase_peaks_of`),
    extrapolated from models of 1, 2 and 3 layers if each layer adds the same amount to each peak.

    The live memory at a moment in layer k of n alike layers depends on n only through what the other layers
    keep, and within a phase all of them keep the same. So the peak of a phase is the larger one of a
    constant, for moments in the first layer, and of a linear function of n, for moments in the last; once the
    linear function is larger, it remains so. Over several phases that would be wrong: a forward pass may keep
    rounded weights, which are freed before the backward pass.
    """
    whole = num_layers(config)
    if not alike or whole <= FEW[-1] + 1:
        return max(count(config))
    largest = 0
    for one, two, three in zip(*(count(with_layers(config, number)) for number in FEW), strict=True):
        step = three - two
        if step <= 0 or step != two - one:
            return max(count(config))
        largest = max(largest, three + step * (whole - FEW[-1]))
    return largest
