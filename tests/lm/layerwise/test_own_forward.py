"""The model's own forward layer by layer gives the bits of a plain call."""

import numpy as np
import pytest
import torch

from dpo_cache.lm import own_forward
from dpo_cache.lm.layerwise.own_forward import all_own_logps, own_logps_together
from dpo_cache.lm.own_forward import own_logps, own_logps_at
from dpo_cache.lm.runner import run_loaded
from tests.conftest import make_completions
from tests.lm.layerwise.test_scoring import layer_major_of, make


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", ["llama", "gemma3n_text", "falcon"])
def test_log_probs_are_those_of_a_plain_call(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, completions = make(family), make_completions(num_prompts=2)
    run = layer_major_of(model)
    expected = [own_logps(model, completion) for completion in completions]
    found = all_own_logps(model, completions, run)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    monkeypatch.setattr(own_forward, "most_places", lambda _: 4)  # logits of few tokens at once
    found = all_own_logps(model, completions, run)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def test_a_model_in_the_forest_runs_with_its_original_attention() -> None:
    model, completions = make("llama"), make_completions(num_prompts=2)
    run, places = layer_major_of(model), np.array([0])
    expected = [own_logps_at(model, completion, places) for completion in completions]
    with run_loaded(model, name="mine", max_length=64, budget_tokens=40) as runner:
        wanted = [(completion, places) for completion in completions]
        found = own_logps_together(model, wanted, run, runner.attention.original)
        assert runner.attention.name == "forest" and model.config._attn_implementation != "sdpa"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
