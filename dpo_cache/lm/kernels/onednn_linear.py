"""Linear layers on a CPU, through the faster of the two libraries that torch includes.

In float32 torch uses MKL, which reaches half of the speed of processors that Intel did not make; oneDNN has
no such limit. The two are timed once, on the model's largest layer. oneDNN sums a dot product in one run, MKL
in several: oneDNN's rounding error is 1.5 to 2 times as large, still that of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from timeit import timeit
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.patches import Patches

PROBE_TOKENS = 256
# Below this size of the largest layer, calls cost more than products, so timing shows nothing.
MIN_WEIGHTS = 2**17
MIN_SPEEDUP = 0.95  # oneDNN is used if it takes at most this share of MKL's time
CLEAR_SPEEDUP = 0.8  # the same where two runs should decide alike under any other load on the machine


def use_fast_linear(
    model: PreTrainedModel,
    patches: Patches | None = None,
    *,
    min_speedup: float = MIN_SPEEDUP,
    decided: bool | None = None,
) -> bool:
    """Run the model's linear layers through oneDNN if that takes at most `min_speedup` of MKL's time.

    Returns whether they do. Rounding differs between the two, so a resumed run passes the previous run's
    choice as `decided`, and nothing is timed.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    if (
        decided is False
        or model.device.type != "cpu"
        or model.dtype != torch.float32
        or not layers
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    inner = [layer for layer in layers if layer.out_features < 16 * layer.in_features]  # not the LM head
    weight = max(inner or layers, key=lambda layer: layer.weight.numel()).weight.detach()
    inputs = torch.linspace(-1, 1, PROBE_TOKENS * weight.shape[1]).view(PROBE_TOKENS, -1)
    if not _agrees(inputs, weight) or (decided is None and not _is_faster(inputs, weight, min_speedup)):
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
    """The matrix products of a linear layer, of matrices x [N, in], weight [out, in] and grad [N, out]."""

    output: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x, weight -> [N, out]
    for_inputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # grad, weight -> [N, in]
    # grad, x, weight -> [out, in]
    for_weight: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def products_of(layer: torch.nn.Module) -> Products:
    """The products of the library that the layer uses."""
    return ONEDNN if isinstance(layer.forward, partial) and layer.forward.func is _forward else TORCH


def onednn_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN, float32 on a CPU."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (inputs, weight, bias)
    ):
        return _OneDnnLinear.apply(inputs, weight, bias)
    return _onednn_output(inputs, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # the weight is frozen under an adapter
        ctx.save_for_backward(inputs if weight.requires_grad else None, weight)
        ctx.shape = inputs.shape
        return _onednn_output(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        return (
            _onednn_for_inputs(grad, weight).view(ctx.shape) if for_inputs else None,
            _onednn_for_weight(grad, inputs.reshape(-1, weight.shape[1]), weight) if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


def _onednn_output(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


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


def _agrees(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN is there and gives the same output and gradients up to rounding."""
    try:
        found = _results(onednn_linear, inputs, weight)
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False  # these operators are internal to torch and may change
    expected = _results(torch.nn.functional.linear, inputs, weight)
    return all(
        torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
        for one, other in zip(found, expected, strict=True)
    )


def _results(
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *tensors: torch.Tensor
) -> list[torch.Tensor]:
    with torch.enable_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = linear(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, output.detach().cos())]


def _is_faster(inputs: torch.Tensor, weight: torch.Tensor, min_speedup: float) -> bool:
    if weight.numel() < MIN_WEIGHTS:
        return False
    runs = [partial(linear, inputs, weight) for linear in (onednn_linear, torch.nn.functional.linear)]
    # alternating, so that other load on the machine affects both
    onednn_s, mkl_s = zip(*([timeit(run, number=1) for run in runs] for _ in range(9)), strict=True)
    return min(onednn_s) < min_speedup * min(mkl_s)
