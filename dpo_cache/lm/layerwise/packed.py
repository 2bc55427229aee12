"""Layers of bitsandbytes whose packed weights are on the device only while they are in use.

Their autograd functions keep the weights as attributes, not as saved tensors. In a plain run of a model, the
memory of these has other content when the backward pass comes: then such a layer runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dpo_cache.lm.layerwise.streamed import StreamedWeights


class LayerUse:
    """One use of a layer's weights."""

    def __init__(self, weights: StreamedWeights, index: int):
        self._weights, self._index, self._number = weights, index, weights.num_uses[index]

    def is_open(self) -> bool:
        """Return whether the copies of this use are still on the device."""
        return self._weights.is_open(self._index) and self._number == self._weights.num_uses[self._index]

    def open_again(self) -> AbstractContextManager[None]:
        """While it is open, the layer's weights are on the device."""
        return self._weights.use(self._index)


def is_packed(module: torch.nn.Module) -> bool:
    """Return whether bitsandbytes holds the module's weights in 4 or 8 bits."""
    weight = module._parameters.get("weight")
    is_8bit = type(getattr(module, "state", None)).__name__ == "MatmulLtState"
    return is_8bit or getattr(weight, "quant_state", None) is not None


def run_packed(use: LayerUse, forward: Callable[..., torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """`forward(inputs)`, whose backward pass runs it again unless the weights are still there."""
    if not (torch.is_grad_enabled() and inputs.requires_grad):
        return forward(inputs)
    output = _Packed.apply(inputs, use, forward)
    assert isinstance(output, torch.Tensor)
    return output


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, use: LayerUse, forward: Callable[..., torch.Tensor]) -> Any:
        ctx.save_for_backward(inputs)
        ctx.use, ctx.forward, ctx.ran = use, forward, _run(forward, inputs)
        return ctx.ran[1].detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ran, ctx.ran = ctx.ran, None
        if ran is not None and ctx.use.is_open():
            return torch.autograd.grad(ran[1], ran[0], grads[0])[0], None, None
        with ctx.use.open_again():
            inputs, output = _run(ctx.forward, *ctx.saved_tensors)
            return torch.autograd.grad(output, inputs, grads[0])[0], None, None


def _run(forward: Callable[..., torch.Tensor], inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        return leaf, forward(leaf)
