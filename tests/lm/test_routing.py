"""The router loss, compared with transformers' own on padded rows."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_cache.errors import OptionError
from dpo_cache.lm.policy import completion_logps
from dpo_cache.lm.routing import router_coefficient
from dpo_cache.lm.rows import run_rows
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.losses.policy_losses import router_loss
from tests.conftest import make_completions, make_llama
from tests.families.tiny import make_tiny
from tests.lm.families import make_model

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["forest", "rows", "row by row"])
def test_the_router_loss_and_its_gradient_are_those_of_a_padded_batch(family: str, how: str) -> None:
    completions, plain, model = make_completions(num_prompts=4), make_model(family), make_model(family)
    rows = run_rows(plain, completions, output_router_logits=True)
    expected = load_balancing_loss_func(rows.router_logits, 4, 2, rows.uses)
    expected.backward()
    attention = (
        choose_attention(model, max_length=64)
        if how == "forest"
        else AttentionChoice("rows", "", max_rows=1 if how == "row by row" else None)
    )
    assert attention.name in how or how == "row by row"
    found = completion_logps(model, completions, attention, with_routing=True)
    assert found.routing is not None
    loss = router_loss(found.routing.choices_E, found.routing.probs_E, found.routing.num_rows)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None and other.grad.any():
            assert torch.allclose(
                one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())
            ), name


def test_prompts_count_once_for_each_completion() -> None:
    model, completions = make_model("mixtral"), make_completions(num_prompts=3)
    found = completion_logps(model, completions, choose_attention(model, max_length=64), with_routing=True)
    assert found.routing is not None and found.routing.num_rows == 2 * sum(map(len, completions))
    assert found.routing.choices_E.sum() == 2 * found.routing.num_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_coefficient_is_the_models_own_unless_another_is_given(family: str) -> None:
    model = make_model(family)
    assert router_coefficient(model, None) == model.config.router_aux_loss_coef > 0
    assert router_coefficient(model, 0.5) == 0.5 and router_coefficient(model, 0.0) == 0.0


def test_a_model_without_routers_has_no_router_loss() -> None:
    assert router_coefficient(make_llama(), None) == router_coefficient(make_llama(), 0.0) == 0.0
    with pytest.raises(OptionError, match="LlamaForCausalLM returns no router logits"):
        router_coefficient(make_llama(), 0.1)


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", ["doge", "flint"])
def test_a_model_without_experts_of_a_family_of_mixtures_has_no_router_loss(family: str) -> None:
    model = make_tiny(family)
    assert model.config.router_aux_loss_coef > 0 and router_coefficient(model, None) == 0.0
    with pytest.raises(OptionError, match="ForCausalLM returns no router logits"):
        router_coefficient(model, 0.5)


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_config_that_does_not_name_the_number_of_chosen_experts_is_refused() -> None:
    with pytest.raises(
        OptionError, match="has no `num_experts_per_tok`, so the chosen experts are not known"
    ):
        router_coefficient(make_tiny("dbrx"), 0.5)
    assert router_coefficient(make_tiny("dbrx"), None) == 0.0
