from itertools import combinations

import pytest
import torch

from dpo_cache.lm.kernels import onednn_linear as linear
from dpo_cache.lm.kernels.onednn_linear import (
    KINDS,
    ONEDNN,
    TORCH,
    Products,
    fast_linear,
    mixed_products,
    name_of,
    products_of,
    use_fast_linear,
)
from tests.conftest import make_llama

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
SUBSETS = [kinds for size in range(len(KINDS) + 1) for kinds in combinations(KINDS, size)]


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
        assert torch.allclose(fast_linear(inputs, weight, bias, ONEDNN).double(), exact, atol=2e-5)


@pytest.mark.rotating(3)
@needs_onednn
@pytest.mark.parametrize("shape", [(1, 3, 32), (7, 32), (1, 300, 32)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kinds", SUBSETS, ids=name_of)
def test_all_products_give_the_same_gradients(
    shape: tuple[int, ...], has_bias: bool, kinds: tuple[str, ...]
) -> None:
    inputs, weight, bias = torch.randn(shape), torch.randn(40, 32), torch.randn(40) if has_bias else None
    leaves = [tensor.requires_grad_() for tensor in (inputs, weight, bias) if tensor is not None]
    # gradients can have any layout
    outward = torch.randn(*shape[:-1], 40).transpose(-1, -2).contiguous().transpose(-1, -2)
    output = fast_linear(inputs, weight, bias, mixed_products(kinds))
    found = torch.autograd.grad(output, leaves, outward)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(torch.nn.functional.linear(*doubles), doubles, outward.double())
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-4)


@needs_onednn
def test_what_needs_no_gradient_gets_none() -> None:
    inputs, weight = torch.randn(5, 32, requires_grad=True), torch.randn(40, 32)
    fast_linear(inputs, weight, None, ONEDNN).sum().backward()
    assert inputs.grad is not None and torch.allclose(inputs.grad, weight.sum(0).expand(5, 32), atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("trains", [True, False])
def test_a_model_that_is_faster_that_way_is_switched_and_has_the_same_gradients(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_is_faster", lambda *_: True)
    model, plain, ids = make_llama(), make_llama(), torch.arange(40)[None]
    assert use_fast_linear(model, trains=trains) == "onednn"
    expected, found = plain(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    for logits in (expected, found):
        logits.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-4 * float(other.grad.abs().max()))


@needs_onednn
@pytest.mark.parametrize("kinds", SUBSETS, ids=name_of)
def test_each_product_of_a_model_that_trains_is_the_faster_one(
    kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_is_faster", lambda kind, *_: kind in kinds)
    model, again = make_llama(), make_llama()
    name = use_fast_linear(model, trains=True)
    monkeypatch.setattr(linear, "_is_faster", lambda *_: pytest.fail("timed again"))
    assert use_fast_linear(again, trains=True, decided=name) == name  # as a resumed run does
    for layer in (model.lm_head, again.lm_head):
        for kind in KINDS:
            library = ONEDNN if kind in kinds else TORCH
            assert getattr(products_of(layer), kind) is getattr(library, kind)


@needs_onednn
def test_only_outputs_are_timed_for_a_model_that_is_only_run_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(linear, "_is_faster", lambda kind, *_: timed.append(kind))
    assert use_fast_linear(make_llama()) == "torch" and timed == ["output"]


def test_a_model_is_unchanged_where_onednn_is_slower_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    monkeypatch.setattr(linear, "_is_faster", lambda *_: False)
    assert use_fast_linear(model, trains=True) == "torch"
    monkeypatch.undo()
    missing = Products(*(lambda *_: (_ for _ in ()).throw(RuntimeError("no such operator")) for _ in KINDS))
    monkeypatch.setattr(linear, "ONEDNN", missing)
    assert use_fast_linear(model, decided="onednn") == "torch"
    assert use_fast_linear(make_llama().to(torch.bfloat16), decided="onednn") == "torch"
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("wrong", KINDS)
def test_a_library_with_other_numbers_is_never_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {kind: getattr(TORCH, kind) for kind in KINDS}
    others[wrong] = lambda *operands: getattr(TORCH, wrong)(*operands) * 1.1
    monkeypatch.setattr(linear, "ONEDNN", Products(**others))
    monkeypatch.setattr(linear, "_is_faster", lambda *_: True)
    assert use_fast_linear(make_llama(), trains=True) == "torch"


@needs_onednn
def test_small_layers_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_seconds", lambda *_: pytest.fail("timed"))
    assert use_fast_linear(make_llama(), trains=True) == "torch"


@needs_onednn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("onednn_s", "expected"), [(0.94, True), (0.96, False)])
def test_the_fastest_turn_of_each_library_decides(
    kind: str, onednn_s: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = iter([(onednn_s, 2.0), (3.0, 1.0), (3.0, 2.0)])
    waiting: list[float] = []

    def seconds(_: object) -> float:
        if not waiting:
            waiting.extend(next(shown))
        return waiting.pop(0)

    monkeypatch.setattr(linear, "_seconds", seconds)
    assert linear._is_faster(kind, torch.zeros(2, 512), torch.zeros(512, 512), 0.95) is expected
