"""Copies in the dtype of the products: their gradients are those of the weights, as under autocast."""

import torch

from dpo_cache.lm.layerwise.copies import _as_function_of, _leaf_in
from dpo_cache.planning.live_bytes import LiveBytes

SIZE = 512


def test_gradients_of_a_rounded_copy_are_added_up_in_float32() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaf = _leaf_in(torch.float32, weight.detach().bfloat16())
    for scale in (1.0, 1e-3, 3.0):
        inputs = torch.full((1, 8), scale)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            torch.nn.functional.linear(inputs, weight).sum().backward()
            torch.nn.functional.linear(
                inputs, _as_function_of(leaf, weight.detach().bfloat16())
            ).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    assert torch.equal(leaf.grad, weight.grad)


def test_a_later_gradient_takes_no_memory_in_float32() -> None:
    copy = torch.zeros(SIZE, SIZE, dtype=torch.bfloat16)
    leaf = _leaf_in(torch.float32, copy)
    _as_function_of(leaf, copy).sum().backward()
    with LiveBytes() as live:
        (_as_function_of(leaf, copy) * 2).sum().backward()
    assert live.peak < 4 * SIZE**2  # the products and their gradients in bfloat16
