"""Activations in host memory: which are moved, that no number changes, and the remark on a CPU."""

import gc
import weakref

import pytest
import torch

from dpo_cache.lm.memory import offload
from dpo_cache.lm.memory.offload import offload_activations
from dpo_cache.lm.memory.recompute import MODES, Recomputation
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import choose_attention
from tests.conftest import make_llama
from tests.lm.families import make_model
from tests.lm.memory.test_recompute import COMPLETIONS, gradients

MIN_BYTES = 4096  # tiny models have tiny activations


class FakeTransfer:
    """Copies in the same memory: the tensors that come back are others."""

    def __init__(self) -> None:
        self.moved: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self.num_fetched = self.num_waited = 0

    def to_host(self, content: torch.Tensor) -> torch.Tensor:
        self.addresses.append(content.data_ptr())
        self.moved.append(content.clone())
        return self.moved[-1]

    def to_device(self, content: torch.Tensor) -> torch.Tensor:
        self.num_fetched += 1
        return content.clone()

    def wait(self, arriving: torch.Tensor) -> torch.Tensor:
        self.num_waited += 1
        return arriving


@pytest.mark.rotating(5)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "gpt2", "deepseek_v3", "bloom"])
def test_gradients_are_the_same_to_the_bit(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", MIN_BYTES)
    model = make_model(family)
    chosen = choose_attention(model, max_length=64)
    Recomputation(model).mode = mode
    expected = gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
    transfer = FakeTransfer()
    assert offload_activations(model, pytest.fail, transfer) == 2
    for _ in range(2):
        found = gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert transfer.moved and transfer.num_fetched == len(transfer.moved) <= transfer.num_waited


def test_weights_shared_and_small_tensors_stay_and_all_else_is_moved_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", MIN_BYTES)
    model = make_llama()
    chosen = choose_attention(model, max_length=64)
    seen: list[tuple[int, int]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        kept.append(tensor)  # so that no address is reused
        return tensor

    kept: list[torch.Tensor] = []
    layers = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    shared: set[int] = set()
    plain = [layer.forward for layer in layers]

    def spy(forward, *args, **kwargs):
        kept.append(args[0])
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = forward(*args, **kwargs)
        shared.update(tensor.untyped_storage().data_ptr() for tensor in kwargs["position_embeddings"])
        shared.update(mask.untyped_storage().data_ptr() for mask in kwargs["forest_plan"].masks.values())
        return output

    for layer, forward in zip(layers, plain, strict=True):
        layer.forward = lambda *args, forward=forward, **kwargs: spy(forward, *args, **kwargs)
    completion_logps(model, COMPLETIONS, chosen)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    expected = {
        (address, size) for address, size in seen if size >= MIN_BYTES and address not in shared | weights
    }
    for staying in (shared, weights):
        assert any(address in staying and size >= MIN_BYTES for address, size in seen)

    for layer, forward in zip(layers, plain, strict=True):
        layer.forward = forward
    transfer = FakeTransfer()
    offload_activations(model, pytest.fail, transfer)
    completion_logps(model, COMPLETIONS, chosen)
    assert sorted(content.numel() for content in transfer.moved) == sorted(size for _, size in expected)
    assert min(content.numel() for content in transfer.moved) >= MIN_BYTES
    assert not weights & set(transfer.addresses)


def test_fetched_activations_are_freed_after_their_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", MIN_BYTES)
    model = make_llama(num_hidden_layers=6)
    chosen, transfer = choose_attention(model, max_length=64), FakeTransfer()
    alive: list[weakref.ref] = []
    make = offload._SavedTensors.__init__

    def note(self, *args):
        alive.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(offload._SavedTensors, "__init__", note)
    offload_activations(model, pytest.fail, transfer)
    gc.collect()
    gc.disable()
    try:
        sums, counts = completion_logps(model, COMPLETIONS, chosen).sums(), []
        assert sum(ref() is not None for ref in alive) == 6
        for layer in [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]:
            layer.input_layernorm.weight.register_post_accumulate_grad_hook(
                lambda _: counts.append(sum(ref() is not None for ref in alive))
            )
        sums.sum().backward()
    finally:
        gc.enable()
    assert counts == sorted(counts, reverse=True) and counts[0] >= 5 and counts[-1] <= 2


def test_nothing_is_moved_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    model, transfer = make_llama(), FakeTransfer()
    chosen = choose_attention(model, max_length=64)
    offload_activations(model, pytest.fail, transfer)
    with torch.no_grad():
        completion_logps(model, COMPLETIONS, chosen)
    assert not transfer.moved


def test_on_a_cpu_a_remark_reports_no_effect() -> None:
    model, remarks = make_llama(), []
    before = [module.forward for module in model.modules()]
    assert offload_activations(model, remarks.append) == 0
    assert remarks == [
        "`offload_activations` has no effect on cpu, whose activations are in host memory already."
    ]
    assert [module.forward for module in model.modules()] == before


def test_on_a_model_without_such_layers_a_remark_reports_no_effect() -> None:
    remarks: list[str] = []
    assert offload_activations(torch.nn.Linear(2, 2), remarks.append, FakeTransfer()) == 0
    assert remarks == ["`offload_activations` has no effect: Linear has no layers that take it."]
