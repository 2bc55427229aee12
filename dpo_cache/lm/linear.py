"""Linear layers on a CPU, through the faster of the two libraries that torch brings.

In float32 torch takes MKL, which on processors of other makers than its own uses half of what they can do; oneDNN
does not. Which is faster here is measured on the model's own largest layer, once, and the other is left alone.
oneDNN adds up a dot product in one run, MKL in several: its rounding error is 1.5 to 2 times as large, still fp32's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

PROBE_TOKENS = 256
WORTH = 0.95  # of MKL's time that oneDNN may take to be worth the change


def use_fast_linear(model: PreTrainedModel) -> bool:
    """Let the model's linear layers run through oneDNN where that is faster; whether it is. Without gradients only."""
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    if model.device.type != "cpu" or model.dtype != torch.float32 or not layers or not torch.backends.mkldnn.is_available():
        return False
    inner = [layer for layer in layers if layer.out_features < 16 * layer.in_features]  # not the LM head
    if not _is_faster(max(inner or layers, key=lambda layer: layer.weight.numel())):
        return False
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return True


def onednn_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by oneDNN, float32 on a CPU, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _forward(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() or inputs.dtype != torch.float32:
        return torch.nn.functional.linear(inputs, layer.weight, layer.bias)
    return onednn_linear(inputs, layer.weight, layer.bias)


def _is_faster(layer: torch.nn.Linear) -> bool:
    """Whether oneDNN is there, gives the same numbers up to rounding, and takes less time."""
    inputs = torch.linspace(-1, 1, PROBE_TOKENS * layer.in_features).view(PROBE_TOKENS, layer.in_features)
    weight = layer.weight.detach()
    try:
        found = onednn_linear(inputs, weight)
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):  # an operator of torch's own, which may come and go
        return False
    expected = torch.nn.functional.linear(inputs, weight)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        return False
    return _best_time(partial(onednn_linear, inputs, weight)) < WORTH * _best_time(partial(torch.nn.functional.linear, inputs, weight))


def _best_time(run: Callable[[], torch.Tensor], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)
