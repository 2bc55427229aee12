"""When the backward pass of a layer-major run has the whole gradient of a parameter."""

from __future__ import annotations

import torch

from dpo_cache.lm.layerwise.passes import BOTTOM
from dpo_cache.lm.layerwise.record import Layers


def parameters_when_whole(model: torch.nn.Module, layers: Layers) -> dict[int, list[torch.nn.Parameter]]:
    """The trained parameters whose gradients are whole once the backward pass has left each index.

    A layer that is called several times is left at its first call; parameters that anything outside of the
    layers uses as well (tied ones) are whole at the end, at `BOTTOM`.
    """
    inside = {module for layer in layers.order for module in layer.modules()}
    outside = {
        id(parameter)
        for module in model.modules()
        if module not in inside
        for parameter in module.parameters(recurse=False)
    }
    first: dict[int, int] = {}
    for index, layer in enumerate(layers.order):
        for parameter in layer.parameters():
            first.setdefault(id(parameter), index)
    whole: dict[int, list[torch.nn.Parameter]] = {index: [] for index in range(BOTTOM, len(layers))}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_outside = id(parameter) in outside
            whole[BOTTOM if is_outside else first.get(id(parameter), BOTTOM)].append(parameter)
    return whole
