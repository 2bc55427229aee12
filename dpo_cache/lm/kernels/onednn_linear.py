"""Linear layers on a CPU, each kind of product through the faster of the two libraries that torch includes.

In float32 torch uses MKL, which reaches half of the speed of some processors that Intel did not make. oneDNN
has no such limit, but on other processors its products for gradients are the slower ones. The two are timed
once, on the model's largest layer. oneDNN sums a dot product in one run, MKL in several: oneDNN's rounding
error is 1.5 to 2 times as large, still that of fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.patches import Patches
from dpo_cache.log import phase

PROBE_TOKENS = 256
PROBE_TURNS, PROBE_S = 9, 1.0  # turns of timing; fewer where they take longer than this
# Below this size of the largest layer, calls cost more than products, so timing shows nothing.
MIN_WEIGHTS = 2**17
MAX_PROBED_WEIGHTS = 2**24  # weights of the largest probed layer; a probe of a whole LM head takes gigabytes
MIN_SPEEDUP = 0.95  # oneDNN is used if it takes at most this share of MKL's time
CLEAR_SPEEDUP = 0.8  # the same where two runs should decide alike under any other load on the machine


@dataclass(frozen=True)
class Products:
    """The matrix products of a linear layer, of matrices x [N, in], weight [out, in] and grad [N, out]."""

    output: Callable[..., torch.Tensor]  # x, weight and perhaps a bias -> [N, out]
    for_inputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # grad, weight -> [N, in]
    # grad, x, weight -> [out, in]
    for_weight: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


KINDS = tuple(entry.name for entry in fields(Products))


@phase("timing matrix products")
def use_fast_linear(
    model: PreTrainedModel,
    patches: Patches | None = None,
    *,
    trains: bool = False,
    min_speedup: float = MIN_SPEEDUP,
    decided: str | None = None,
) -> str:
    """Run each kind of product of the model's linear layers by oneDNN if that takes at most `min_speedup` of
    MKL's time.

    Returns the library: "torch", "onednn" or, for some of the products, as in "onednn for output". Rounding
    differs between the two, so a resumed run passes the previous run's choice as `decided`, and nothing is
    timed. Unless the model `trains`, the gradients' products are not timed, and are oneDNN's with the output.
    """
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    layers = [module for module in linear if not hasattr(module, "_hf_hook")]  # accelerate fetches the weight
    if (
        decided == "torch"
        or model.device.type != "cpu"
        or model.dtype != torch.float32
        or not layers
        or not torch.backends.mkldnn.is_available()
    ):
        return "torch"
    inner = [layer for layer in layers if layer.out_features < 16 * layer.in_features]  # not the LM head
    weight = max(inner or layers, key=lambda layer: layer.weight.numel()).weight.detach()
    weight = _in_memory(weight, max(1, MAX_PROBED_WEIGHTS // weight.shape[1]))
    inputs = torch.linspace(-1, 1, PROBE_TOKENS * weight.shape[1]).view(PROBE_TOKENS, -1)
    if not _agrees(inputs, weight):
        return "torch"
    kinds: Collection[str] = KINDS
    if decided is not None:
        kinds = _kinds_of(decided)
    elif trains:
        kinds = [kind for kind in KINDS if _is_faster(kind, inputs, weight, min_speedup)]
    elif not _is_faster("output", inputs, weight, min_speedup):
        kinds = ()
    if kinds:
        run, patches = _FastForward(mixed_products(kinds)), patches or Patches()
        for layer in layers:
            patches.wrap(layer, run)
    return name_of(kinds)


def name_of(kinds: Collection[str]) -> str:
    """The result of `use_fast_linear` where oneDNN computes these kinds of products."""
    chosen = [kind for kind in KINDS if kind in kinds]
    if len(chosen) in (0, len(KINDS)):
        return "onednn" if chosen else "torch"
    return f"onednn for {' and '.join(chosen)}"


def _kinds_of(name: str) -> Collection[str]:
    """The inverse of `name_of`."""
    return KINDS if name == "onednn" else name.removeprefix("onednn for ").split(" and ")


def mixed_products(kinds: Collection[str]) -> Products:
    """oneDNN's products of these kinds, torch's of the others."""
    if set(kinds) == set(KINDS):
        return ONEDNN
    return Products(*(getattr(ONEDNN if kind in kinds else TORCH, kind) for kind in KINDS))


def _in_memory(weight: torch.Tensor, most_rows: int) -> torch.Tensor:
    """The first rows of a weight; where it is read or gathered only when it is used, others of their shape,
    whose products take as long.
    """
    if not weight.is_meta and type(weight) is torch.Tensor:
        return weight[:most_rows]
    num_rows, width = min(most_rows, weight.shape[0]), weight.shape[1]
    return torch.linspace(0, num_rows * width, num_rows * width).sin().view(num_rows, width)


def use_torch_linear(model: PreTrainedModel) -> None:
    """Undo `use_fast_linear`."""
    for module in model.modules():
        if products_of(module) is not TORCH:
            del module.forward


def products_of(layer: torch.nn.Module) -> Products:
    """The products that the layer uses."""
    forward = layer.forward
    if isinstance(forward, partial) and isinstance(forward.func, _FastForward):
        return forward.func.products
    return TORCH


def has_own_forward(layer: torch.nn.Linear) -> bool:
    """Return whether another program replaced the layer's `forward` or sees its output."""
    is_replaced = "forward" in vars(layer) and products_of(layer) is TORCH
    return is_replaced or bool(layer._forward_hooks)


def fast_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Products
) -> torch.Tensor:
    """`torch.nn.functional.linear` by these products, float32 on a CPU."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (inputs, weight, bias)
    ):
        return _FastLinear.apply(inputs, weight, bias, products)
    return products.output(inputs, weight, bias)


class _FastForward:
    """The `forward` of a linear layer by these products, for `Patches.wrap`."""

    def __init__(self, products: Products):
        self.products = products

    def __call__(
        self, layer: torch.nn.Linear, forward: Callable[..., torch.Tensor], inputs: torch.Tensor
    ) -> torch.Tensor:
        if inputs.dtype != torch.float32 or not inputs.numel() or torch.is_autocast_enabled("cpu"):
            return forward(inputs)
        return fast_linear(inputs, layer.weight, layer.bias, self.products)


class _FastLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        products: Products,
    ) -> torch.Tensor:
        # the weight is frozen under an adapter
        ctx.save_for_backward(inputs if weight.requires_grad else None, weight)
        ctx.shape, ctx.products = inputs.shape, products
        return products.output(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_weight = None
        if for_weight:
            grad_weight = ctx.products.for_weight(grad, inputs.reshape(-1, weight.shape[1]), weight)
        return (
            ctx.products.for_inputs(grad, weight).view(ctx.shape) if for_inputs else None,
            grad_weight,
            grad.sum(0) if for_bias else None,
            None,
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


def _agrees(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether oneDNN is there and gives the same output and gradients up to rounding."""
    try:
        found = _results(ONEDNN, inputs, weight)
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False  # these operators are internal to torch and may change
    expected = _results(TORCH, inputs, weight)
    # weights that are not finite are reported where they are scored
    return all(
        bool(other.isfinite().all())
        and torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
        for one, other in zip(found, expected, strict=True)
    )


def _results(products: Products, inputs: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        output = products.output(inputs, weight)
        grad = output.cos()
        return [output, products.for_inputs(grad, weight), products.for_weight(grad, inputs, weight)]


def _is_faster(kind: str, inputs: torch.Tensor, weight: torch.Tensor, min_speedup: float) -> bool:
    """Return whether oneDNN computes this kind of product in at most `min_speedup` of MKL's time."""
    if weight.numel() < MIN_WEIGHTS:
        return False
    grad = inputs.new_ones(len(inputs), len(weight))
    operands = {
        "output": (inputs, weight),
        "for_inputs": (grad, weight),
        "for_weight": (grad, inputs, weight),
    }
    runs = [partial(getattr(products, kind), *operands[kind]) for products in (ONEDNN, TORCH)]
    times: list[list[float]] = []
    # alternating, so that other load on the machine affects both
    while len(times) < 3 or (len(times) < PROBE_TURNS and sum(map(sum, times)) < PROBE_S):
        times.append([_seconds(run) for run in runs])
    onednn_s, mkl_s = map(min, zip(*times, strict=True))
    return onednn_s < min_speedup * mkl_s


@torch.no_grad()
def _seconds(run: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
