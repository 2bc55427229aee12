import pytest
import torch

from dpo_cache.lm.kernels import onednn_linear as linear
from dpo_cache.lm.kernels.onednn_linear import onednn_linear, use_fast_linear
from tests.conftest import make_llama

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 3, 32), (7, 32), (1, 300, 32)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_onednn_gives_the_same_layer(shape: tuple[int, ...], has_bias: bool) -> None:
    inputs, weight = torch.randn(shape), torch.randn(40, 32)
    bias = torch.randn(40) if has_bias else None
    exact = torch.nn.functional.linear(
        inputs.double(), weight.double(), None if bias is None else bias.double()
    )
    with torch.no_grad():
        assert torch.allclose(onednn_linear(inputs, weight, bias).double(), exact, atol=2e-5)


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 3, 32), (7, 32), (1, 300, 32)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_onednn_gives_the_same_gradients(shape: tuple[int, ...], has_bias: bool) -> None:
    inputs, weight, bias = torch.randn(shape), torch.randn(40, 32), torch.randn(40) if has_bias else None
    leaves = [tensor.requires_grad_() for tensor in (inputs, weight, bias) if tensor is not None]
    # gradients can have any layout
    outward = torch.randn(*shape[:-1], 40).transpose(-1, -2).contiguous().transpose(-1, -2)
    found = torch.autograd.grad(onednn_linear(inputs, weight, bias), leaves, outward)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(torch.nn.functional.linear(*doubles), doubles, outward.double())
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-4)


@needs_onednn
def test_what_needs_no_gradient_gets_none() -> None:
    inputs, weight = torch.randn(5, 32, requires_grad=True), torch.randn(40, 32)
    onednn_linear(inputs, weight).sum().backward()
    assert inputs.grad is not None and torch.allclose(inputs.grad, weight.sum(0).expand(5, 32), atol=1e-4)


@needs_onednn
def test_a_model_that_is_faster_that_way_is_switched_and_has_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_is_faster", lambda *_: True)
    model, plain, ids = make_llama(), make_llama(), torch.arange(40)[None]
    assert use_fast_linear(model)
    expected, found = plain(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    for logits in (expected, found):
        logits.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-4 * float(other.grad.abs().max()))


@needs_onednn
def test_a_run_that_has_decided_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_is_faster", lambda *_: pytest.fail("timed again"))
    assert use_fast_linear(make_llama(), decided=True)
    assert not use_fast_linear(make_llama(), decided=False)


def test_a_model_is_unchanged_where_onednn_is_slower_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    monkeypatch.setattr(linear, "_is_faster", lambda *_: False)
    assert not use_fast_linear(model)
    monkeypatch.undo()
    monkeypatch.setattr(
        linear, "onednn_linear", lambda *_: (_ for _ in ()).throw(RuntimeError("no such operator"))
    )
    assert not use_fast_linear(model)
    assert not use_fast_linear(make_llama().to(torch.bfloat16))
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_library_with_other_numbers_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        linear, "onednn_linear", lambda inputs, weight: torch.nn.functional.linear(inputs, weight) * 1.1
    )
    monkeypatch.setattr(linear, "_is_faster", lambda *_: True)
    assert not use_fast_linear(make_llama())


@needs_onednn
def test_small_layers_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "timeit", lambda *_, **__: pytest.fail("timed"))
    assert not use_fast_linear(make_llama())
