"""Scores layer by layer equal those of the resident path to the bit, whatever the windows."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from dpo_cache.lm.budget import Budget
from dpo_cache.lm.layerwise.record import find_layers
from dpo_cache.lm.layerwise.scoring import score_layer_major
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.types import Completion
from tests.conftest import make_completions
from tests.families.tiny import make_tiny

CPU = torch.device("cpu")
# tied head, learned positions, experts, per-layer inputs and shared keys, soft caps, rows only: no forest, layers
# that are called twice
FAMILIES = ("llama", "gpt2", "mixtral", "gemma3n_text", "gemma2", "falcon", "zamba2")


def fixed(tokens: int) -> Budget:
    return Budget(tokens, CPU, lambda _: None)


def layer_major_of(model: PreTrainedModel, **options: int) -> LayerMajor:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        layers = find_layers(model, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return LayerMajor(layers, ResidentWeights(), CPU, **{"window_bytes": 2**30, **options})


def assert_equal(
    model: PreTrainedModel,
    completions: list[Completion],
    attention: AttentionChoice,
    tokens: int,
    run: LayerMajor,
) -> None:
    expected = dict(
        entry
        for step in score_completions(model, completions, attention, fixed(tokens))
        for entry in step.scores
    )
    steps = list(score_layer_major(model, completions, attention, fixed(tokens), run))
    found = [entry for step in steps for entry in step.scores]
    assert sorted(index for index, _ in found) == list(range(len(completions)))
    assert all(np.array_equal(score.token_logps, expected[index].token_logps) for index, score in found)
    assert sum(step.num_tokens for step in steps) == steps[-1].total_tokens


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_resident_path(family: str) -> None:
    torch.manual_seed(0)
    model, completions = make_tiny(family).eval(), make_completions()
    run = layer_major_of(model)
    attention = choose_attention(model, max_length=64)
    for tokens, window in ((13, 60), (13, None), (64, None), (4096, None)):
        run.window_tokens = window
        assert_equal(model, completions, attention, tokens, run)
