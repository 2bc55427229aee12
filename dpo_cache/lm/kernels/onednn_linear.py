"""Linear layers on a CPU, through the faster of the two libraries that torch brings.

In float32 torch takes MKL, which on processors of other makers than its own uses half of what they can do;
oneDNN does not. Which is faster here is measured on the model's own largest layer, once, and the other is
left alone. oneDNN adds up a dot product in one run, MKL in several: its rounding error is 1.5 to 2 times as
large, still fp32's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.patches import Patches

PROBE_TOKENS = 256
# of a layer: where the largest is smaller, calls cost more than products, and times tell nothing
LEAST_WEIGHTS = 2**17
MIN_SPEEDUP = 0.95  # of MKL's time that oneDNN may take to be worth the change
CLEAR_SPEEDUP = 0.8  # the same where two runs are to decide alike, whatever else the machine does


def use_fast_linear(
    model: PreTrainedModel,
    patches: Patches | None = None,
    *,
    min_speedup: float = MIN_SPEEDUP,
    decided: bool | None = None,
) -> bool:
    """Run the model's linear layers through oneDNN where that takes at most `min_speedup` of MKL's time.

    Returns whether they do. Rounding differs between the two, so a resumed run passes the choice of the run
    before as `decided`, and nothing is measured.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    if (
        model.device.type != "cpu"
        or model.dtype != torch.float32
        or not layers
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    inner = [layer for layer in layers if layer.out_features < 16 * layer.in_features]  # not the LM head
    probe = _Probe(max(inner or layers, key=lambda layer: layer.weight.numel()))
    if decided is False or not probe.agrees() or (decided is None and not probe.is_faster(min_speedup)):
        return False
    patches = patches or Patches()
    for layer in layers:
        patches.wrap(layer, _forward)
    return True


def use_torch_linear(model: PreTrainedModel) -> None:
    """Undo `use_fast_linear`."""
    for module in model.modules():
        if products_of(module) is ONEDNN:
            del module.forward


@dataclass(frozen=True)
class Products:
    """The three matrix products of a linear layer, of matrices x [N, in], weight [out, in] and grad [N,
    out].
    """

    output: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x, weight -> [N, out]
    for_inputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # grad, weight -> [N, in]
    # grad, x, weight -> [out, in]
    for_weight: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def products_of(layer: torch.nn.Module) -> Products:
    """The products by the library that the layer runs through."""
    return ONEDNN if isinstance(layer.forward, partial) and layer.forward.func is _forward else TORCH


def onednn_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN, float32 on a CPU."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (inputs, weight, bias)
    ):
        return _OneDnnLinear.apply(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # under an adapter it is frozen
        ctx.save_for_backward(inputs if weight.requires_grad else None, weight)
        ctx.shape = inputs.shape
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inputs = _onednn_for_inputs(grad, weight).view(ctx.shape) if for_inputs else None
        grad_weight = (
            _onednn_for_weight(grad, inputs.reshape(-1, weight.shape[1]), weight) if for_weight else None
        )
        return grad_inputs, grad_weight, grad.sum(0) if for_bias else None


def _onednn_output(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


def _onednn_for_inputs(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.mkldnn_linear_backward_input(
        [len(grad), weight.shape[1]], grad.contiguous().to_mkldnn(), weight
    ).to_dense()


def _onednn_for_weight(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    opaque = grad.contiguous().to_mkldnn(), inputs.contiguous().to_mkldnn()
    return torch.ops.aten.mkldnn_linear_backward_weights(*opaque, weight, False)[0].to_dense()


TORCH = Products(torch.nn.functional.linear, torch.mm, lambda grad, inputs, _: grad.t() @ inputs)
ONEDNN = Products(_onednn_output, _onednn_for_inputs, _onednn_for_weight)


def _forward(
    layer: torch.nn.Linear, forward: Callable[..., torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    if inputs.dtype != torch.float32 or not inputs.numel() or torch.is_autocast_enabled("cpu"):
        return forward(inputs)
    return onednn_linear(inputs, layer.weight, layer.bias)


class _Probe:
    """Both libraries on one layer's weight."""

    def __init__(self, layer: torch.nn.Linear):
        self.inputs = torch.linspace(-1, 1, PROBE_TOKENS * layer.in_features).view(
            PROBE_TOKENS, layer.in_features
        )
        self.weight = layer.weight.detach()

    def agrees(self) -> bool:
        """Whether oneDNN is there and gives the same numbers and gradients up to rounding."""
        try:
            found = self._results(onednn_linear)
        except (
            RuntimeError,
            AttributeError,
            NotImplementedError,
            TypeError,
        ):  # operators of torch's own, which may come and go
            return False
        expected = self._results(torch.nn.functional.linear)
        return all(
            torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
            for one, other in zip(found, expected, strict=True)
        )

    def is_faster(self, min_speedup: float) -> bool:
        if self.weight.numel() < LEAST_WEIGHTS:
            return False
        runs = [
            partial(linear, self.inputs, self.weight)
            for linear in (onednn_linear, torch.nn.functional.linear)
        ]
        # in turn, so that other load on the machine affects both
        rounds = [[_time(run) for run in runs] for _ in range(9)]
        return min(times[0] for times in rounds) < min_speedup * min(times[1] for times in rounds)

    def _results(self, linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        with torch.enable_grad():
            leaves = [self.inputs.clone().requires_grad_(), self.weight.clone().requires_grad_()]
            output = linear(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, output.detach().cos())]


def _time(run: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
