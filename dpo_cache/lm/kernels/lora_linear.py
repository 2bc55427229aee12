"""LoRA (arXiv:2106.09685) on linear layers, with less in memory and fewer passes over it than PEFT's own
forward.

    output = base(x) + scaling (x A^T) B^T

PEFT makes each product, sum and cast a separate tensor and keeps most of them for the backward pass: under
mixed precision a wide and a narrow copy of every input. Here the update of a layer is one operation, which
adds the product to the base's output and keeps only the layer's input, without a cast, and x A^T. On a CPU,
where all numbers have one dtype, the base is part of the operation, which adds both the update and its
gradient in place.

N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch

from dpo_cache.lm.device import autocast_dtype, planning_device_type
from dpo_cache.lm.kernels.onednn_linear import Products, has_own_forward, products_of
from dpo_cache.lm.patches import Patches

# PEFT's layers whose base has plain weights, or weights of bitsandbytes
KINDS = ("Linear", "Linear4bit", "Linear8bitLt")


def use_fast_lora(model: torch.nn.Module, patches: Patches | None = None) -> int:
    """Run the model's plain LoRA layers as one operation each; returns their number. PEFT still runs DoRA and
    other variants.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    patches = patches or Patches()
    for layer in layers:
        patches.wrap(layer, _run)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """Return whether the layer is a linear layer with the update of the formula."""
    is_linear = type(layer).__name__ in KINDS and isinstance(layer.get_base_layer(), torch.nn.Linear)
    return is_linear and all(
        name not in layer.lora_variant
        and type(down) is type(layer.lora_B[name]) is torch.nn.Linear
        and layer.lora_B[name].bias is None
        for name, down in layer.lora_A.items()
    )


def _run(layer: Any, forward: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.disable_adapters or layer.merged or layer.training or len(names) != 1:
        return forward(inputs, *args, **kwargs)
    base = layer.base_layer
    down, up = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    if _is_one_operation(base, inputs, down, up):
        scaling, products = layer.scaling[names[0]], products_of(base)
        sums_NO = _AdaptedLinear.apply(inputs, base.weight, base.bias, down, up, scaling, products)
        return sums_NO.view(*inputs.shape[:-1], sums_NO.shape[1])
    output = base(inputs)
    dtype = autocast_dtype(inputs.device) or down.dtype
    with torch.autocast(inputs.device.type, enabled=False):
        sums_NO = _AddUpdate.apply(output, inputs, down, up, layer.scaling[names[0]], dtype)
        return sums_NO.view(output.shape).to(output.dtype)


def _is_one_operation(base: Any, inputs: torch.Tensor, *adapter: torch.Tensor) -> bool:
    """Return whether `_AdaptedLinear` computes the same: a frozen linear layer on a CPU, and one dtype."""
    return (
        type(base) is torch.nn.Linear
        and not has_own_forward(base)
        and planning_device_type(inputs.device) == "cpu"
        and autocast_dtype(inputs.device) is None
        and inputs.numel() > 0
        and all(tensor.dtype == inputs.dtype for tensor in (base.weight, *adapter))
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


class _AdaptedLinear(torch.autograd.Function):
    """`inputs W^T + bias + scaling (inputs A^T) B^T` as [N, O]; not a view, so that the model's code may
    change it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight_OI: torch.Tensor,
        bias: torch.Tensor | None,
        down_RI: torch.Tensor,
        up_OR: torch.Tensor,
        scaling: float,
        products: Products,
    ) -> torch.Tensor:
        inputs_NI = inputs.reshape(-1, inputs.shape[-1])
        narrow_NR = inputs_NI @ down_RI.t()
        ctx.save_for_backward(inputs, narrow_NR, weight_OI, down_RI, up_OR)
        ctx.scaling, ctx.products = scaling, products
        return products.output(inputs_NI, weight_OI, bias).addmm_(narrow_NR, up_OR.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, narrow_NR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        for_inputs, _, _, for_down, for_up = ctx.needs_input_grad[:5]
        grad_NO = grads[0]
        grad_NR, grad_inputs = (grad_NO @ up_OR).mul_(ctx.scaling), None
        if for_inputs:
            grad_inputs = ctx.products.for_inputs(grad_NO, weight_OI).addmm_(grad_NR, down_RI)
            grad_inputs = grad_inputs.view(inputs.shape)
        return (
            grad_inputs,
            None,
            None,
            grad_NR.t() @ inputs.reshape(-1, inputs.shape[-1]) if for_down else None,
            (grad_NO.t() @ narrow_NR).mul_(ctx.scaling) if for_up else None,
            None,
            None,
        )


class _AddUpdate(torch.autograd.Function):
    """`output + scaling (inputs A^T) B^T` as [N, O]; not a view, so that the model's code may change it."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        down_RI: torch.Tensor,
        up_OR: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        narrow_NR = _rows(inputs, dtype) @ down_RI.to(dtype).t()
        ctx.save_for_backward(inputs, narrow_NR, down_RI, up_OR)
        ctx.scaling, ctx.shape = scaling, output.shape
        return torch.addmm(_rows(output, dtype), narrow_NR, up_OR.to(dtype).t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, narrow_NR, down_RI, up_OR = ctx.saved_tensors
        for_output, for_inputs, for_down, for_up = ctx.needs_input_grad[:4]
        dtype = narrow_NR.dtype
        grad_NO = _rows(grads[0], dtype)
        grad_NR = (grad_NO @ up_OR.to(dtype)).mul_(ctx.scaling)
        return (
            grads[0].reshape(ctx.shape) if for_output else None,
            (grad_NR @ down_RI.to(dtype)).view(inputs.shape).to(inputs.dtype) if for_inputs else None,
            (grad_NR.t() @ _rows(inputs, dtype)).to(down_RI.dtype) if for_down else None,
            (grad_NO.t() @ narrow_NR).mul_(ctx.scaling).to(up_OR.dtype) if for_up else None,
            None,
            None,
        )


def _rows(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., I] as [N, I] in the dtype of the products."""
    return tensor.reshape(-1, tensor.shape[-1]).to(dtype)
