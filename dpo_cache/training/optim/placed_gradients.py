"""Gradients of a layer-major step, each moved to where the placement keeps it as soon as it is complete.

    device   the gradient stays with its parameter
    host     it moves to host memory, from where the update reads it
    none     it updates its parameter, and is dropped

A parameter whose home is the host has a copy on the device; the copy's gradient is the parameter's. With
several ranks, a complete gradient is first added up over them, once.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.layerwise.passes import BOTTOM
from dpo_cache.lm.layerwise.record import Layers
from dpo_cache.lm.layerwise.whole import parameters_when_whole
from dpo_cache.training.optim.clipping import norm_of
from dpo_cache.training.optim.update_in_backward import OptimizerInBackward
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.ranks import Ranks

Gradients = dict[torch.nn.Parameter, torch.Tensor]


class CopiedWeights(Protocol):
    """Weights whose parameters have copies on the device."""

    def leaves(self, key: int | str) -> dict[str, torch.Tensor]:
        """The copies of a layer, of "bottom" or of "top", by the parameter's name."""
        ...

    def refresh(self, key: int | str | None = None) -> None:
        """Update the copies, because the parameters have changed."""
        ...


class PlacedGradients:
    """The gradients of one run; `take_top` and `take` are called as the backward pass reaches the layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Layers,
        *,
        keeps_on_host: bool,
        in_backward: OptimizerInBackward | None,
        copies: CopiedWeights | None,
        ranks: Ranks | None = None,
    ):
        self._ranks, self._device = ranks or Ranks(), model.device
        self._whole = parameters_when_whole(model, layers)
        self._by_name = dict(model.named_parameters(remove_duplicate=False))
        self._in_backward, self._copies, self._keeps_on_host = in_backward, copies, keeps_on_host
        self._on_host: Gradients = {}
        self._norms: list[torch.Tensor] = []  # norms of the gradients on the host
        self._buffers: Gradients = {}  # pinned memory, reused by the next step

    def take_top(self) -> None:
        """After the backward pass of the losses, move the gradients of the top's copies to its parameters."""
        for name, leaf in self._leaves("top"):
            self._add(self._by_name[name], leaf)

    def take(self, index: int) -> None:
        """Take the gradients of the layer at this index, or of `BOTTOM`, which are complete."""
        ready = self._add_up(self._whole[index], self._ready(index))
        if self._in_backward is not None:
            self._in_backward.take(ready)
            for key in _keys(index) if self._copies is not None else ():
                self._copies.refresh(key)  # type: ignore[union-attr]
        elif self._keeps_on_host:
            self._move(ready)
        else:
            for home, grad in ready.items():
                home.grad = grad

    def try_take(self, index: int) -> None:
        """Do the same in a trial step: as much stays on the device, but nothing is updated, and no
        other rank takes part.
        """
        keeps = self._in_backward is None and not self._keeps_on_host
        for home, grad in self._ready(index).items():
            home.grad = grad if keeps else None

    def clip(self, parameters: list[torch.nn.Parameter], max_norm: float) -> float:
        """Scale the gradients on the host such that their norm is at most `max_norm`; returns it."""
        if not self._norms:
            return math.nan  # there was no backward pass, because the loss is not finite
        norm = float(torch.linalg.vector_norm(torch.stack([one.cpu() for one in self._norms])))
        if norm > max_norm and math.isfinite(norm):
            torch._foreach_mul_(list(self._on_host.values()), max_norm / (norm + 1e-6))
        assert all(one.grad is None for one in parameters), "all gradients are on the host"
        return norm

    def update(self, optimizer: Updater) -> None:
        """Update the parameters whose gradients are on the host."""
        optimizer.update(*self._on_host, gradients=self._on_host)

    @property
    def is_on_host(self) -> bool:
        """Return whether the gradients of the step are on the host."""
        return self._keeps_on_host

    def end_step(self) -> None:
        """Drop the remaining gradients, after the weights were updated or if they will not be."""
        self._on_host, self._norms = {}, []
        if self._copies is not None:
            keys: list[int | str] = [index for index in self._whole if index != BOTTOM]
            for key in (*keys, "bottom", "top"):
                for _, leaf in self._leaves(key):
                    leaf.grad = None
            self._copies.refresh()

    def _ready(self, index: int) -> Gradients:
        """The gradients of this rank that are complete now. Copies lose theirs."""
        whole, ready = self._whole[index], Gradients()
        for key in _keys(index):
            for name, leaf in self._leaves(key):
                home = self._by_name[name]
                if home.grad is None and home not in ready and home in set(whole):
                    ready[home], leaf.grad = leaf.grad, None  # type: ignore[assignment]
                else:
                    self._add(home, leaf, ready.pop(home, None))
        return ready | {one: one.grad for one in whole if one.grad is not None}

    def _add_up(self, whole: list[torch.nn.Parameter], ready: Gradients) -> Gradients:
        """The sums of the gradients over the ranks; a gradient that this rank lacks counts as 0."""
        if self._ranks.size == 1:
            return ready
        kinds = self._ranks.gather([_kind(ready.get(one)) for one in whole])
        for one, of_ranks in zip(whole, zip(*kinds, strict=True), strict=True):
            known = [kind for kind in of_ranks if kind is not None]
            if known and one not in ready:
                dtype, is_on_host = known[0]
                device = torch.device("cpu") if is_on_host else self._device
                ready[one] = torch.zeros(one.shape, dtype=dtype, device=device)
        summed = {one: ready[one].contiguous() for one in whole if one in ready}
        self._ranks.add_up(list(summed.values()))
        return summed

    def _leaves(self, key: int | str) -> list[tuple[str, torch.Tensor]]:
        """The copies that have a gradient, by name."""
        found = {} if self._copies is None else self._copies.leaves(key)
        return [(name, leaf) for name, leaf in found.items() if leaf.grad is not None]

    @torch.no_grad()
    def _add(self, home: torch.nn.Parameter, leaf: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Add a copy's gradient, and an earlier one, to the parameter's."""
        for grad in (before, leaf.grad):
            if grad is not None:
                moved = grad.to(home.device, home.dtype)
                home.grad = moved if home.grad is None else home.grad.add_(moved)
        leaf.grad = None

    @torch.no_grad()
    def _move(self, ready: Gradients) -> None:
        """Start to move gradients to the host."""
        for home, grad in ready.items():
            self._norms.append(norm_of(grad))
            home.grad = None
            if grad.device.type == "cpu":
                self._on_host[home] = grad
                continue
            if home not in self._buffers:
                is_pinned = grad.device.type == "cuda"
                self._buffers[home] = torch.empty(grad.shape, dtype=grad.dtype, pin_memory=is_pinned)
            self._on_host[home] = self._buffers[home].copy_(grad, non_blocking=True)


def _keys(index: int) -> tuple[int | str, ...]:
    """The keys of the copies whose gradients are complete at the same time."""
    return ("bottom", "top") if index == BOTTOM else (index,)


def _kind(gradient: torch.Tensor | None) -> tuple[torch.dtype, bool] | None:
    """The dtype of a gradient, and whether it is on the host."""
    return None if gradient is None else (gradient.dtype, gradient.device.type == "cpu")
