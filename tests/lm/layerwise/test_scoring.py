"""Scores layer by layer equal those of the resident path to the bit, whatever the windows."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.budget import Budget
from dpo_cache.lm.layerwise.record import find_layers
from dpo_cache.lm.layerwise.scoring import score_layer_major
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.types import Completion
from tests.conftest import make_completions
from tests.families.tiny import make_tiny
from tests.lm.test_self_check import ScaledEmbeddings, make_custom

CPU = torch.device("cpu")
# tied head, learned positions, experts, per-layer inputs and shared keys, soft caps, rows only: no forest, layers
# that are called twice
FAMILIES = ("llama", "gpt2", "mixtral", "gemma3n_text", "gemma2", "falcon", "zamba2")


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return make_tiny(family).eval()


def fixed(tokens: int) -> Budget:
    return Budget(tokens, CPU, lambda _: None)


def layer_major_of(model: PreTrainedModel, **options: int) -> LayerMajor:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        layers = find_layers(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return LayerMajor(layers, ResidentWeights(), CPU, **{"window_bytes": 2**30, **options})


def scores_of(steps: Iterable[ScoringStep]) -> dict[int, np.ndarray]:
    return {index: score.token_logps for step in steps for index, score in step.scores}


def assert_equal(
    model: PreTrainedModel,
    completions: list[Completion],
    attention: AttentionChoice,
    tokens: int,
    run: LayerMajor,
) -> None:
    expected = scores_of(score_completions(model, completions, attention, fixed(tokens)))
    steps = list(score_layer_major(model, completions, attention, fixed(tokens), run))
    found = scores_of(steps)
    assert sum(len(step.scores) for step in steps) == len(found) == len(completions)
    assert all(np.array_equal(values, expected[index]) for index, values in found.items())
    assert sum(step.num_tokens for step in steps) == steps[-1].total_tokens
    assert not steps[-1].is_followed and not any(step.num_tokens for step in steps if step.is_followed)


@pytest.mark.rotating(2)
@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_resident_path(family: str) -> None:
    model, completions = make(family), make_completions(num_prompts=4)
    run = layer_major_of(model)
    attention = choose_attention(model, max_length=64)
    for tokens, window in ((13, 60), (64, None)):
        run.window_tokens = window
        assert_equal(model, completions, attention, tokens, run)


@pytest.mark.rotating(3)
@pytest.mark.parametrize("window", [1, 40, None])
@pytest.mark.parametrize("kernel", ["segments", "varlen", "flex"])
def test_every_kernel_continues_its_path_in_the_next_window(kernel: str, window: int | None) -> None:
    model, completions = make("llama"), make_completions(num_prompts=3)
    run = layer_major_of(model, window_tokens=window)
    attention = replace(choose_attention(model, max_length=64), kernel=kernel)
    assert_equal(model, completions, attention, 11, run)


def test_a_forward_that_is_run_as_a_whole_is_run_so_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, completions = make_custom(ScaledEmbeddings), make_completions(num_prompts=2)
    run, attention = layer_major_of(model), choose_attention(model, max_length=64)
    assert attention.is_whole
    assert_equal(model, completions, attention, 64, run)
    monkeypatch.setattr("dpo_cache.lm.own_forward.most_places", lambda _: 5)
    monkeypatch.setattr("dpo_cache.lm.layerwise.own_forward.most_places", lambda _: 5)
    assert_equal(model, completions, attention, 64, run)


def test_memory_that_runs_out_halves_the_chunks_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, completions = make("llama"), make_completions(num_prompts=8)
    run, attention = layer_major_of(model, window_tokens=160), choose_attention(model, max_length=64)
    expected = scores_of(score_completions(model, completions, attention, fixed(40)))
    layer, sizes = model.model.layers[1], list[int]()
    real = layer.forward

    def limited(states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        sizes.append(states.shape[1])
        if len(sizes) > 2 and states.shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", limited)
    remarks: list[str] = []
    budget = Budget(80, CPU, remarks.append)
    steps = list(score_layer_major(model, completions, attention, budget, run))
    found = scores_of(steps)
    assert remarks == ["out of memory with 80 tokens at once; continuing with 40. Nothing is lost."]
    assert sum(len(step.scores) for step in steps) == len(completions) == len(found)
    assert all(np.abs(found[index] - values).max() < 1e-5 for index, values in expected.items())
    assert sizes[:2] == [80, 80], "the first window had ended"
