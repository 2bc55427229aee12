"""Recorded calls: gradients as if everything were kept, in less memory, and never from changed tensors."""

import pytest
import torch
from torch import nn

from dpo_cache.lm.kernels import head
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.memory.recompute_later import recompute_later, recording
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.planning.live_bytes import LiveBytes
from tests.conftest import make_completions
from tests.lm.families import FAMILIES, make_model


def gradients(model: torch.nn.Module, mode: str, precision: str = "fp32") -> dict[str, torch.Tensor]:
    recomputation = Recomputation(model)
    recomputation.mode = mode
    attention = choose_attention(model, max_length=64)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False, enabled=precision == "bf16-mixed"):
        logps = completion_logps(model, make_completions(num_prompts=3), attention)
    logps.sums().sum().backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.rotating(5)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_are_those_of_keeping_everything(family: str) -> None:
    kept, cheap = (gradients(make_model(family), mode) for mode in ("none", "cheap"))
    assert kept.keys() == cheap.keys()
    for name, expected in kept.items():  # sums in another order, in float32
        assert (cheap[name] - expected).abs().max() <= 2e-5 * expected.abs().max() + 1e-7, name


def test_mixed_precision_casts_and_rounds_as_before() -> None:
    kept, cheap = (gradients(make_model("llama"), mode, "bf16-mixed") for mode in ("none", "cheap"))
    exact = gradients(make_model("llama"), "none")
    for name, expected in exact.items():
        assert (cheap[name] - expected).abs().max() <= 1.1 * (kept[name] - expected).abs().max() + 1e-6, name


@pytest.mark.parametrize(("precision", "most"), [("fp32", 0.6), ("bf16-mixed", 0.7)])
def test_less_is_kept(precision: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.LOGITS_KEPT, "cpu", 0)  # in every mode, and most of what a tiny model keeps
    found = {}
    for mode in ("none", "cheap"):
        model = make_model("llama")
        Recomputation(model).mode = mode
        attention = choose_attention(model, max_length=64)
        with (
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False, enabled=precision == "bf16-mixed"),
            LiveBytes() as live,
        ):
            # enough for the attention's mask, of one size for all forests, not to count
            logps = completion_logps(model, make_completions(num_prompts=100), attention)
            found[mode] = live.now
        del logps
    assert found["cheap"] < most * found["none"]


def test_a_frozen_norm_before_a_trained_layer_is_computed_again() -> None:
    norm, layer, inputs = nn.LayerNorm(8).requires_grad_(False), nn.Linear(8, 4), torch.randn(3, 8)
    with recording():
        output = layer(recompute_later(norm, inputs))
    output.sum().backward()
    assert torch.allclose(layer.weight.grad, norm(inputs).sum(0).expand(4, 8))


def test_calls_on_outputs_of_calls_and_on_views_of_them() -> None:
    inputs = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def run() -> torch.Tensor:
        hidden = recompute_later(torch.sin, recompute_later(torch.exp, inputs))
        return (hidden[:, 1:4].t().reshape(4, 3) @ weight + hidden.sum()).sum()

    run().backward()
    expected, inputs.grad, weight.grad = [inputs.grad, weight.grad], None, None
    with recording():
        loss = run()
    loss.backward()
    for one, other in zip(expected, (inputs.grad, weight.grad), strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


def test_a_tensor_that_was_changed_in_place_is_not_computed_again() -> None:
    inputs = torch.randn(4, requires_grad=True)
    scale = torch.randn(4, requires_grad=True)
    with recording():
        output = recompute_later(torch.exp, inputs * 1)
        changed = output.mul_(2)  # no longer the output of the call: kept as it is
        loss = (changed * scale).sum()
    loss.backward()
    assert torch.allclose(scale.grad, 2 * inputs.detach().exp())
    assert torch.allclose(inputs.grad, 2 * inputs.detach().exp() * scale.detach())

    source = inputs * 1
    with recording():
        loss = (recompute_later(torch.exp, source) * scale).sum()
        source.add_(1)
    with pytest.raises(RuntimeError, match="was changed in place"):
        loss.backward()


def test_a_second_backward_pass_is_refused() -> None:
    inputs = torch.randn(4, requires_grad=True)
    with recording():
        loss = recompute_later(torch.exp, inputs).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_outside_and_without_gradients_nothing_is_recorded() -> None:
    inputs = torch.randn(4, requires_grad=True)
    assert recompute_later(torch.exp, inputs).grad_fn.name() == "ExpBackward0"
    with recording(), torch.no_grad():
        assert recompute_later(torch.exp, inputs).grad_fn is None
