"""Gradients of a layer-major step, each taken where the placement keeps it as soon as it is whole.

    device   stays with its parameter
    host     moves to host memory, from where the update reads it
    none     updates its parameter, and is dropped

A parameter whose home is the host has a copy on the device, whose gradient comes home first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from dpo_cache.lm.layerwise.passes import BOTTOM
from dpo_cache.lm.layerwise.record import Layers
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward


class CopiedWeights(Protocol):
    """Weights whose parameters have copies on the device."""

    def leaves(self, key: int | str) -> dict[str, torch.Tensor]:
        """The copies of a layer, of "bottom" or of "top", by the parameter's name."""
        ...

    def refresh(self, key: int | str | None = None) -> None:
        """The parameters have changed."""
        ...


class PlacedGradients:
    """Those of one run; `take` is called with each index of `LayerPasses.backward`, `take_top` before."""

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Layers,
        *,
        keeps_on_host: bool,
        in_backward: OptimizerInBackward | None,
        copies: CopiedWeights | None,
    ):
        self._whole = parameters_when_whole(model, layers)
        self._by_name = dict(model.named_parameters(remove_duplicate=False))
        self._in_backward, self._copies, self._keeps_on_host = in_backward, copies, keeps_on_host
        self.on_host: dict[torch.nn.Parameter, torch.Tensor] = {}  # of parameters on the device

    def take_top(self) -> None:
        """Bring home the gradients of the top's copies, whose losses have had their backward pass."""
        self._bring_home("top")

    def take(self, index: int) -> None:
        """The gradients of the layer, or of `BOTTOM`, are whole."""
        keys: tuple[int | str, ...] = ("bottom", "top") if index == BOTTOM else (index,)
        for key in keys:
            self._bring_home(key)
        for parameter in self._whole[index]:
            if parameter.grad is None:
                continue
            if self._in_backward is not None:
                self._in_backward.take(parameter)
            elif self._keeps_on_host and parameter.device.type != "cpu":
                self.on_host[parameter] = to_host(parameter.grad)
                parameter.grad = None
        if self._in_backward is not None and self._copies is not None:
            for key in keys:
                self._copies.refresh(key)

    def return_to_device(self, parameter: torch.nn.Parameter) -> None:
        """Give a parameter on the device its gradient back, for its update."""
        if parameter in self.on_host:
            parameter.grad = self.on_host.pop(parameter).to(parameter.device, non_blocking=True)

    def end_step(self) -> None:
        """The weights have been updated."""
        self.on_host.clear()
        if self._copies is not None:
            self._copies.refresh()

    def _bring_home(self, key: int | str) -> None:
        """Add the gradients of copies to those of their parameters."""
        if self._copies is None:
            return
        for name, leaf in self._copies.leaves(key).items():
            if leaf.grad is None:
                continue
            home, grad = self._by_name[name], leaf.grad
            leaf.grad = None
            moved = to_host(grad) if home.device.type == "cpu" else grad
            moved = moved.to(home.dtype)
            home.grad = moved if home.grad is None else home.grad.add_(moved)


def parameters_when_whole(model: torch.nn.Module, layers: Layers) -> dict[int, list[torch.nn.Parameter]]:
    """The trained parameters whose gradients are whole once the backward pass has left each index.

    A layer that is called several times is left at its first call; parameters that anything outside of the
    layers uses as well (tied ones) are whole at the end, at `BOTTOM`.
    """
    inside = {module for layer in layers.order for module in layer.modules()}
    outside = {id(one) for module in model.modules() if module not in inside for one in _direct(module)}
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


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where that makes copies faster. Waits for the copy."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor)


def _direct(module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    return module.parameters(recurse=False)
