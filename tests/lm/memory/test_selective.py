"""What selective recomputation keeps is what the operator returned, whatever the model does with it later."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.memory.selective import KeptOutputs
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import choose_attention
from tests.families.tiny import make_tiny
from tests.lm.memory.test_recompute import COMPLETIONS, gradients

Layer = Callable[[torch.Tensor, torch.Tensor], Any]
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)


def plain(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(inputs @ weight) * inputs


def changed(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product is changed in place before it is used."""
    product = inputs @ weight
    product += inputs
    return product.sin() * product


def changed_through_a_view(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As Gemma 3n's AltUp does; torch sees no change of the product, whose version counter stays."""
    product = torch.matmul(inputs[None], weight[None].expand(1, 5, 5)).permute(0, 2, 1)
    product += inputs
    return product.permute(0, 2, 1)[0].sin() * inputs


def changed_twice(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    product = inputs @ weight
    product.mul_(2.0)[:2].add_(inputs[:2])
    return product.cos() * (product @ weight)


def run(
    layer: Layer, *, selective: bool, after: Callable[[Any], torch.Tensor] = torch.exp
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(5, 5, generator=generator).requires_grad_() for _ in range(2)]
    if selective:
        kept = KeptOutputs(lambda operator, _: operator in PRODUCTS)
        output = checkpoint(layer, *leaves, use_reentrant=False, context_fn=kept.contexts)
        kept.end_forward(output)
    else:
        output = layer(*leaves)
    after(output).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("layer", [plain, changed, changed_through_a_view, changed_twice])
def test_the_gradient_is_that_of_the_plain_layer(layer: Layer) -> None:
    for found, expected in zip(run(layer, selective=True), run(layer, selective=False), strict=True):
        assert torch.equal(found, expected)


def test_a_result_that_a_later_layer_changes_is_kept_as_it_was() -> None:
    def returns_a_product(inputs: torch.Tensor, weight: torch.Tensor) -> Any:
        product = inputs @ weight
        return torch.stack([product.sin(), product.cos()]), product.view(-1)

    def returns_a_copy(inputs: torch.Tensor, weight: torch.Tensor) -> Any:
        both, product = returns_a_product(inputs, weight)
        return both, product.clone()

    def after(outputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        both, product = outputs
        product.add_(3.0)
        return both.sum() + product.exp().sum()

    found = run(returns_a_product, selective=True, after=after)
    expected = run(returns_a_copy, selective=False, after=after)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_outputs_are_copied_only_where_they_change() -> None:
    kept = KeptOutputs(lambda operator, _: operator in PRODUCTS)
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    with kept.contexts()[0]:
        unchanged, product = one @ other, other @ one
        product += 1
    first, second = (output.leaves[0] for output in kept._outputs[torch.ops.aten.mm.default])
    assert first.data_ptr() == unchanged.data_ptr()
    assert second.data_ptr() != product.data_ptr()
    assert torch.equal(second, other @ one)


def test_each_operators_outputs_are_reused_once_in_their_order() -> None:
    kept = KeptOutputs(lambda operator, _: operator in PRODUCTS)
    keep, reuse = kept.contexts()
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    with keep:
        first, second = one @ other, other @ one
    with reuse:
        assert torch.equal(one @ one, first) and torch.equal(
            one @ one, second
        )  # the products are not computed
        with pytest.raises(RuntimeError, match="not deterministic"):
            one @ one


@pytest.mark.parametrize("family", ["gemma3n_text", "gpt_oss"])
def test_models_that_change_products_in_place_get_the_gradients_without_recomputation(family: str) -> None:
    model = make_tiny(family)
    chosen = choose_attention(model, max_length=64)
    recomputation, found = Recomputation(model), {}
    for recomputation.mode in ("none", "selective"):
        found[recomputation.mode] = gradients(model, completion_logps(model, COMPLETIONS, chosen).sums())
    assert found["none"].keys() == found["selective"].keys()
    for name, expected in found["none"].items():
        assert torch.equal(found["selective"][name], expected), name
