"""Models in memory whose computation was changed from outside have no identity."""

import copy
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.model.loaded import identify_loaded
from dpo_cache.lm.model.untouched import check_untouched
from tests.conftest import make_llama


def refused(model: torch.nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_untouched(model, "here")


@pytest.fixture
def sharp() -> Iterator[str]:
    """An attention function of the user's."""

    def attention(module: torch.nn.Module, *given: torch.Tensor, **options: object) -> object:
        return sdpa_attention_forward(module, *given, **{**options, "scaling": 0.1})

    AttentionInterface.register("sharp", attention)
    AttentionMaskInterface.register("sharp", sdpa_mask)
    yield "sharp"
    del AttentionInterface._global_mapping["sharp"], AttentionMaskInterface._global_mapping["sharp"]


@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_a_model_as_it_was_made_is_untouched(chosen: str) -> None:
    model = make_llama()
    model.set_attn_implementation(chosen)
    check_untouched(model, "here")
    model.model.layers[0].mlp.compile(backend="eager")
    check_untouched(model, "here")


def test_an_attention_function_of_the_users_is_refused(sharp: str) -> None:
    model = make_llama()
    check_untouched(model, "here")  # registered, but not chosen
    model.set_attn_implementation(sharp)
    refused(
        model, "here: its attn_implementation is 'sharp', a function that was registered from outside of "
    )


def test_it_is_refused_in_the_config_of_one_layer(sharp: str) -> None:
    model = make_llama()
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = sharp
    refused(model, "attn_implementation is 'sharp'")


def test_it_is_refused_under_the_name_of_one_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", lambda *given, **_: given[1])
    model = make_llama()
    model.set_attn_implementation("sdpa")
    refused(model, "its attn_implementation is 'sdpa', a function that was registered from outside")


def test_hooks_on_every_module_are_refused() -> None:
    model = make_llama()
    for register in (
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            refused(model, "here: there are hooks on the forward pass of every module")
        finally:
            handle.remove()
    check_untouched(model, "here")


def test_a_function_of_one_module_that_shadows_a_method_is_refused() -> None:
    for name, function in (
        ("forward", lambda hidden: hidden),
        ("_call_impl", lambda hidden: hidden),
        ("_compiled_call_impl", lambda hidden: hidden),
        ("extra_repr", torch.nn.functional.silu),  # of a library, but not the method
    ):
        model = make_llama()
        setattr(model.model.layers[1].mlp, name, function)
        refused(model, rf"the method {name} of model\.layers\.1\.mlp was replaced")
    model = make_llama()
    model.model.norm.helper = lambda hidden: hidden
    refused(model, r"the function helper of model\.norm was replaced")


def test_hooks_of_accelerate_that_move_tensors_are_no_change() -> None:
    model = dispatch_model(make_llama(), {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    assert "forward" in vars(model.model) and "to" in vars(model)
    check_untouched(model, "here")
    model.lm_head._old_forward = lambda hidden: hidden
    refused(model, r"the function _old_forward of lm_head was replaced")


def test_outputs_that_were_captured_are_no_change() -> None:
    model = make_llama()
    model(torch.arange(3, 9)[None], output_hidden_states=True, output_attentions=False)
    check_untouched(model, "here")


def test_a_bound_function_is_refused_too() -> None:
    model = make_llama()
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, hidden: hidden, mlp)
    refused(model, r"the method forward of model\.layers\.0\.mlp was replaced")


def test_a_method_of_a_class_of_transformers_that_was_replaced_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_llama()
    real = modeling_llama.LlamaMLP.forward
    for other in (
        lambda self, hidden: 1.5 * real(self, hidden),
        torch.no_grad()(lambda self, hidden: real(self, hidden)),
        modeling_gemma.GemmaMLP.forward,
    ):
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", other)
        refused(
            model, r"the method forward of transformers\.models\.llama\.modeling_llama\.LlamaMLP was replaced"
        )
    monkeypatch.undo()
    check_untouched(model, "here")


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "create_causal_mask"])
def test_a_function_of_a_model_that_was_replaced_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One that is of the file, and one that the file imports."""
    real = getattr(modeling_llama, name)
    monkeypatch.setattr(modeling_llama, name, lambda *given, **options: real(*given, **options))
    refused(make_llama(), rf"the function {name} of transformers\.models\.llama\.modeling_llama was replaced")


def test_a_function_of_torch_that_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *given, **_: given[2])
    refused(make_llama(), r"the function scaled_dot_product_attention of torch\.nn\.functional was replaced")


def test_a_config_or_a_list_of_one_module_that_was_changed_is_not_the_checkpoints(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    layer = model.model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    assert identify_loaded(model)[1] is None  # a copy of the same values
    found = []
    for factor in (2.0, 3.0):
        layer.config.rope_parameters = {**layer.config.rope_parameters, "factor": factor}
        identity, difference = identify_loaded(model)
        assert difference == "its module model.layers.1.self_attn was changed"
        found.append(identity["modules"])
    assert found[0] != found[1]
