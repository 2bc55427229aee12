"""The model's own forward on one plain row, against the definition, whatever the model was switched to."""

from functools import partial

import numpy as np
import pytest
import torch

from dpo_cache.lm import own_forward
from dpo_cache.lm.own_forward import own_logps, own_logps_at
from dpo_cache.lm.patches import Patches, without_patches
from dpo_cache.lm.runner import run_loaded
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.lm.families import make_model

TIGHT = 3e-5


@pytest.mark.rotating(2)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "granite", "gpt_oss", "opt"])
def test_it_is_the_definition(family: str) -> None:
    model = make_model(family)
    for completion in make_completions():
        expected = naive_token_logps(model, completion).float()
        found = own_logps(model, completion)
        assert found.dtype == torch.float32 and found.shape == (completion.num_tokens,)
        assert (found - expected).abs().max() < TIGHT


def test_under_the_forest_it_runs_with_the_models_original_attention() -> None:
    model, completions = make_llama(), make_completions()
    with run_loaded(model, name="mine", max_length=64, budget_tokens=40) as runner:
        assert runner.attention.name == "forest"
        switched = model.config._attn_implementation
        for completion in completions:
            found = own_logps(model, completion, original=runner.attention.original)
            assert model.config._attn_implementation == switched, "it is switched back"
            assert (found - naive_token_logps(make_llama(), completion)).abs().max() < TIGHT


def test_the_attention_is_switched_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    with run_loaded(model, name="mine", max_length=64, budget_tokens=40) as runner:
        switched = model.config._attn_implementation
        monkeypatch.setattr(own_forward, "own_logits", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own_logps(model, make_completions()[0], original=runner.attention.original)
        assert model.config._attn_implementation == switched


def test_some_tokens_are_measured_by_one_run() -> None:
    model = make_llama()
    completion = max(make_completions(), key=lambda one: one.num_tokens)
    whole = own_logps(model, completion)
    for places in ([0], [completion.num_tokens - 1], [0, 3, 4], [*range(2, completion.num_tokens)]):
        found = own_logps_at(model, completion, np.array(places))
        assert (found - whole[places]).abs().max() < TIGHT


def test_a_completion_with_many_logits_is_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    completion = max(make_completions(), key=lambda one: one.num_tokens)
    whole = own_logps(model, completion)
    seen: list[int] = []
    run = own_forward.own_logits

    def count(*arguments: object) -> torch.Tensor:
        seen.append(len(arguments[2]))
        return run(*arguments)

    monkeypatch.setattr(own_forward, "most_places", lambda _: 7)
    monkeypatch.setattr(own_forward, "own_logits", count)
    assert (own_logps(model, completion) - whole).abs().max() < TIGHT
    assert sum(seen) == completion.num_tokens and max(seen) == 7


def test_a_model_without_logits_to_keep_returns_them_all() -> None:
    class Plain(type(make_llama())):
        def forward(self, input_ids=None):  # type: ignore[no-untyped-def]
            return super().forward(input_ids=input_ids, use_cache=False)

    model, plain = make_llama(), Plain(make_llama().config).eval()
    plain.load_state_dict(model.state_dict())
    for completion in make_completions():
        assert (own_logps(plain, completion) - naive_token_logps(model, completion)).abs().max() < TIGHT
        places = np.array([0, completion.num_tokens - 1]) if completion.num_tokens > 1 else np.array([0])
        found = own_logps_at(plain, completion, places)
        assert (found - naive_token_logps(model, completion)[places]).abs().max() < TIGHT


def test_faster_functions_are_left_out_meanwhile() -> None:
    model, completion = make_llama(), make_completions()[0]
    expected = own_logps(model, completion)
    layer = model.model.layers[0].mlp.down_proj
    doubled = lambda module, forward, *values: 2 * forward(*values)  # noqa: E731
    patches = Patches()
    patches.wrap(layer, doubled)
    patches.wrap(layer, doubled)  # a patch of a patch
    changed = layer.forward
    assert (naive_token_logps(model, completion) - expected).abs().max() > 0.1
    assert torch.equal(own_logps(model, completion), expected)
    assert layer.forward is changed, "the faster function is back"
    patches.undo()
    assert "forward" not in layer.__dict__


def test_a_forward_that_others_replaced_stays() -> None:
    model = make_llama()
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = partial(
        lambda forward, *values: 3 * forward(*values), layer.forward
    )  # as accelerate's hooks
    theirs, patches = layer.forward, Patches()
    patches.wrap(layer, lambda module, forward, *values: 2 * forward(*values))
    with without_patches(model):
        assert layer.forward is theirs
    patches.undo()
    assert layer.forward is theirs
