"""The counted bytes are those of the allocator."""

import gc

import pytest
import torch

from dpo_cache.planning.live_bytes import LiveBytes, allocated_peak


def test_a_tensor_counts_while_anything_holds_its_memory() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as live:
        first = before + 1
        assert live.now == live.peak == 4000
        view = first[:10]
        first.mul_(2)
        before.add_(1)
        assert live.now == 4000
        del first
        gc.collect()
        assert live.now == 4000 and view.tolist() == [2.0] * 10
        del view
        assert live.now == 0
        second = torch.ones(500, dtype=torch.float64)
    assert live.peak == 4000 and len(second) == 500


def test_tensors_of_the_graph_count_until_its_backward_pass() -> None:
    weight = torch.ones(250, requires_grad=True)
    with LiveBytes() as live:
        loss = (weight.exp().exp()).sum()
        assert live.now == 2 * 1000 + 4
        loss.backward()
        del loss
        assert live.now == 1000  # the gradient
    assert weight.grad is not None


def test_a_layout_without_storage_counts_as_its_values() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN on this processor")
    with LiveBytes() as live:
        opaque = torch.ones(100, 10).to_mkldnn()
        assert live.now == 4000
        del opaque
        assert live.now == 0


def test_the_peak_is_the_allocators() -> None:
    layers = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(5))
    )
    inputs, shared = torch.randn(300, 64), torch.nn.Linear(64, 64)

    def run() -> None:
        layers.zero_grad(set_to_none=True)
        shared.zero_grad(set_to_none=True)
        hidden = layers(inputs)
        # gradients of one tensor from two places, which the engine adds in place
        (shared(hidden) * shared(hidden.sin())).sum().backward()

    with LiveBytes() as live:
        run()
    layers.zero_grad(set_to_none=True)
    shared.zero_grad(set_to_none=True)
    gc.collect()
    assert live.peak == pytest.approx(allocated_peak(run), rel=0.01)
