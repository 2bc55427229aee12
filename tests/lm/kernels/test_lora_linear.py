"""LoRA as one operation per layer has PEFT's outputs and gradients and keeps less; PEFT runs other layers."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dpo_cache.lm.kernels.lora_linear import use_fast_lora
from dpo_cache.lm.kernels.onednn_linear import KINDS, name_of, use_fast_linear
from dpo_cache.lm.model.parts import has_plain_head
from dpo_cache.planning.live_bytes import LiveBytes
from tests.conftest import make_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapt(model: torch.nn.Module, *, is_fast: bool, **config: Any) -> Any:
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if is_fast:
        assert use_fast_lora(adapted) == 14
    return adapted


IDS = torch.arange(24)[None] * 7 % 264


def outcome(adapted: Any, precision: str = "fp32") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed", cache_enabled=False):
        logits = adapted(input_ids=IDS).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    (logits.log_softmax(-1)[..., 5] * torch.linspace(-1, 1, 24)).sum().backward()
    return logits.detach(), {
        name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.grad is not None
    }


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative distance of logits from those in float64."""
    return float((found - exact).norm() / exact.norm())


def gaps(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """Relative distance of each gradient."""
    assert found.keys() == expected.keys()
    return torch.stack(
        [(found[name].double() - other).norm() / other.norm() for name, other in expected.items()]
    )


@pytest.mark.parametrize("kinds", [(), ("output",), KINDS], ids=name_of)
@pytest.mark.parametrize("has_bias", [True, False])
def test_outputs_and_gradients_are_those_of_peft(has_bias: bool, kinds: tuple[str, ...]) -> None:
    fast, plain = (adapt(make_llama(attention_bias=has_bias), is_fast=is_fast) for is_fast in (True, False))
    assert use_fast_linear(fast.base_model.model, decided=name_of(kinds)) == name_of(kinds)
    (logits, grads), (expected, expected_grads) = map(outcome, (fast, plain))
    # which of the two rounds more depends on the CPU
    exact, exact_grads = outcome(adapt(make_llama(attention_bias=has_bias), is_fast=False).double())
    assert distance(logits, exact) < 1.5 * distance(expected, exact) < 2e-6
    assert len(grads) == 28
    assert gaps(grads, exact_grads).max() < 1.5 * gaps(expected_grads, exact_grads).max() < 2e-5


@pytest.mark.rotating(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_is_no_further_from_the_exact_gradients_than_peft(dtype: torch.dtype) -> None:
    """Base weights in either dtype, adapters in float32, products in bfloat16. Averages several models, because
    rounding in one of them is random.
    """
    distances = {True: 0.0, False: 0.0}
    for seed in range(12):
        exact = outcome(adapt(make_llama(seed).to(torch.bfloat16).float(), is_fast=False))[1]
        for is_fast in distances:
            adapted = adapt(make_llama(seed).to(torch.bfloat16).to(dtype), is_fast=is_fast)
            found = outcome(adapted, "bf16-mixed")[1]
            assert {grad.dtype for grad in found.values()} == {torch.float32}
            distances[is_fast] += float(gaps(found, exact).mean()) / 12
    assert distances[True] < 1.15 * distances[False]


def test_pure_bf16_keeps_its_dtype() -> None:
    def run(dtype: torch.dtype, *, is_fast: bool) -> dict[str, torch.Tensor]:
        adapted = adapt(make_llama().to(torch.bfloat16), is_fast=is_fast)
        return outcome(adapted.to(torch.bfloat16).to(dtype))[1]

    found, exact = run(torch.bfloat16, is_fast=True), run(torch.float32, is_fast=False)
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}
    assert gaps(found, exact).mean() < 1.1 * gaps(run(torch.bfloat16, is_fast=False), exact).mean()


def test_adding_the_update_takes_no_other_output_and_its_gradient_no_other_input() -> None:
    adapted = adapt(make_llama(), is_fast=True)
    layer, inputs = adapted.base_model.model.model.layers[0].mlp.up_proj, torch.randn(512, 32)
    inputs.requires_grad_()
    output_bytes, narrow_bytes = 4 * 512 * layer.out_features, 4 * 512 * 4
    with LiveBytes() as live:
        output = layer(inputs)
    assert live.peak == output_bytes + narrow_bytes
    grad = torch.randn_like(output)
    with LiveBytes() as live:
        output.backward(grad)
    # the gradients of the inputs, of x A^T, of A and B, and one of these before it is accumulated
    adapters = 4 * 4 * (32 + layer.out_features)
    assert live.peak <= 4 * inputs.numel() + narrow_bytes + 2 * adapters


@pytest.mark.parametrize("change", ["trained base", "hook", "another forward"])
def test_a_base_that_others_see_is_called(change: str) -> None:
    fast, plain = (adapt(make_llama(), is_fast=is_fast) for is_fast in (True, False))
    calls: list[str] = []
    for adapted in (fast, plain):
        base = adapted.base_model.model.model.layers[0].mlp.up_proj.base_layer
        if change == "trained base":
            base.weight.requires_grad_()
        elif change == "hook":
            base.register_forward_hook(lambda *_: calls.append("hook"))
        else:
            original = base.forward
            base.forward = lambda inputs, original=original: 2 * original(inputs)
    (logits, grads), (expected, expected_grads) = map(outcome, (fast, plain))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)
    assert gaps(grads, expected_grads).max() < 1e-5
    assert len(calls) == (2 if change == "hook" else 0)
    assert len(grads) == (29 if change == "trained base" else 28)


def test_a_layer_keeps_less_than_in_peft_under_mixed_precision() -> None:
    kept = {}
    for is_fast in (True, False):
        adapted = adapt(make_llama().to(torch.bfloat16), is_fast=is_fast)
        layer = adapted.base_model.model.model.layers[0].mlp.up_proj
        inputs = torch.randn(512, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), LiveBytes() as live:
            output = layer(inputs)
            kept[is_fast] = live.now
        del output
    assert kept[True] < 0.75 * kept[False]


def test_peft_runs_adapters_that_are_switched_off_or_merged() -> None:
    adapted, plain = adapt(make_llama(), is_fast=True), make_llama()
    ids = torch.arange(10)[None]
    with_adapter = adapted(input_ids=ids).logits
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(adapted(input_ids=ids).logits, with_adapter) and not torch.equal(
        with_adapter, plain(input_ids=ids).logits
    )
    adapted.merge_adapter()
    assert torch.allclose(adapted(input_ids=ids).logits, with_adapter, atol=1e-5)
    adapted.unmerge_adapter()
    assert torch.allclose(adapted.merge_and_unload()(input_ids=ids).logits, with_adapter, atol=1e-5)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_peft_runs_layers_that_are_not_plain(config: dict[str, Any]) -> None:
    model = make_llama(attention_bias=True)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **config)
    )
    assert use_fast_lora(adapted) == 0


def test_a_head_with_an_adapter_is_not_plain() -> None:
    model = make_llama()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert use_fast_lora(adapted) == 1 and not has_plain_head(model)


def test_the_output_may_be_changed_in_place() -> None:
    """As the code of Falcon and RoCBert does, with a layer's output and with a view of it."""

    def run(*, is_fast: bool) -> dict[str, torch.Tensor]:
        adapted = adapt(make_llama(), is_fast=is_fast)
        layer = adapted.base_model.model.model.layers[0].mlp.up_proj
        inputs = torch.linspace(-1, 1, 2 * 3 * 32).view(2, 3, 32).requires_grad_()
        output = layer(inputs)
        output += 1
        output.view(6, -1)[2:].mul_(3)
        output[0, 0].zero_()
        output.cos().sum().backward()
        assert inputs.grad is not None
        grads = {
            name: parameter.grad for name, parameter in layer.named_parameters() if parameter.requires_grad
        }
        return {**grads, "inputs": inputs.grad}

    found, expected = run(is_fast=True), run(is_fast=False)
    assert len(found) == 3 and gaps(found, expected).max() < 1e-5
