"""Changes to a loaded model: all in one place, idempotent, undone on leaving."""

import pytest
import torch

from dpo_cache.lm.forest.attention import FOREST_ATTENTION
from dpo_cache.lm.kernels.onednn_linear import ONEDNN, TORCH, products_of
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.prepare import prepared
from dpo_cache.lm.self_check import choose_attention
from tests.conftest import make_completions, make_llama

COMPLETIONS = make_completions(num_prompts=2)


def changes(model: torch.nn.Module) -> dict[str, tuple[object, int]]:
    """What an instance has that its class does not: a `forward`, hooks."""
    return {
        name: (module.__dict__.get("forward"), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def test_everything_is_undone_on_leaving_even_after_an_error() -> None:
    model = make_llama()
    add_adapter(model, lora_config(4, None, "all-linear"), seed=0)
    before, attention = changes(model), model.config._attn_implementation
    with (
        pytest.raises(KeyError),
        prepared(model, trains=True, linear="onednn") as run,
    ):
        choose_attention(model, max_length=64)
        assert changes(model) != before and run.recomputation is not None
        raise KeyError
    assert changes(model) == before
    assert model.config._attn_implementation == attention != FOREST_ATTENTION


def test_a_model_that_is_prepared_already_is_left_as_it_is() -> None:
    model = make_llama()
    with prepared(model, linear="onednn") as outer:
        once = changes(model)
        with prepared(model, linear="torch") as inner:
            assert changes(model) == once and inner == outer
            assert products_of(model.lm_head) is ONEDNN
        assert changes(model) == once
    assert products_of(model.lm_head) is TORCH


def test_missing_changes_are_added_and_only_these_are_undone() -> None:
    model = make_llama()
    with prepared(model, linear="onednn"):
        once = changes(model)
        with prepared(model, trains=True) as training:
            assert training.linear == "onednn" and training.recomputation is not None
            assert changes(model) != once
        assert changes(model) == once


def test_a_prepared_model_has_the_gradients_of_a_plain_one() -> None:
    def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
        attention = choose_attention(model, max_length=64)
        completion_logps(model, COMPLETIONS, attention).sums().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected, model = gradients(make_llama()), make_llama()
    with prepared(model, trains=True, linear="onednn") as run:
        assert run.recomputation is not None
        run.recomputation.mode = "cheap"
        found = gradients(model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
