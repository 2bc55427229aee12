import pytest
import torch

from dpo_cache.lm import linear
from dpo_cache.lm.linear import onednn_linear, use_fast_linear
from tests.conftest import make_llama

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 3, 32), (7, 32), (1, 300, 32)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_onednn_gives_the_same_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    inputs, weight = torch.randn(shape), torch.randn(40, 32)
    bias = torch.randn(40) if has_bias else None
    exact = torch.nn.functional.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        assert torch.allclose(onednn_linear(inputs, weight, bias).double(), exact, atol=2e-5)


@needs_onednn
def test_a_model_whose_layers_are_faster_that_way_is_switched_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_is_faster", lambda layer: True)
    model, ids = make_llama(), torch.arange(40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert use_fast_linear(model)
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    model(input_ids=ids).logits.sum().backward()  # with gradients it is torch's own layer
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_is_left_alone_where_that_is_slower_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    monkeypatch.setattr(linear, "_is_faster", lambda layer: False)
    assert not use_fast_linear(model)
    monkeypatch.undo()
    monkeypatch.setattr(linear, "onednn_linear", lambda *_: (_ for _ in ()).throw(RuntimeError("no such operator")))
    assert not use_fast_linear(model)
    assert not use_fast_linear(make_llama().to(torch.bfloat16))
    assert all("forward" not in vars(module) for module in model.modules())


def test_numbers_that_differ_are_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "onednn_linear", lambda inputs, weight: torch.nn.functional.linear(inputs, weight) * 1.1)
    monkeypatch.setattr(linear, "_best_time", lambda run, repeats=5: 0.0)
    assert not use_fast_linear(make_llama())
