"""Every family: the chosen attention gives the log-probs of the model's own forward pass."""

import numpy as np
import pytest
import torch

from dpo_cache.lm.budget import Budget
from dpo_cache.lm.self_check import AttentionChoice, choose_attention, score_completions
from dpo_cache.types import Completion
from tests.conftest import make_completions, make_llama, naive_token_logps
from tests.lm.families import FAMILIES, make_model


def fixed(tokens: int) -> Budget:
    return Budget(tokens, torch.device("cpu"), lambda _: None)


def scores(model, completions: list[Completion], attention: AttentionChoice, budget: int) -> list[np.ndarray]:
    found = dict(
        entry
        for progress in score_completions(model, completions, attention, fixed(budget))
        for entry in progress.scores
    )
    return [found[index].token_logps for index in range(len(completions))]


def assert_as_exact_as_plain(
    model, completions: list[Completion], found: dict[int, list[np.ndarray]], original_attention: str
) -> None:
    """Errs only as much as the model's own forward in float32 does against float64, plus rounding."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(original_attention)
    plain = [naive_token_logps(model, completion, torch.float32).double() for completion in completions]
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped kernel has no float64
    exact_model = model.double()
    for place, (completion, naive) in enumerate(zip(completions, plain, strict=True)):
        exact = naive_token_logps(exact_model, completion)
        for budget, values in found.items():
            error = (torch.from_numpy(values[place]).double() - exact).abs()
            assert (error <= (naive - exact).abs() + 3e-5).all(), f"budget {budget}: {float(error.max())}"


@pytest.mark.rotating(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_the_log_probs_of_its_own_forward(family: str) -> None:
    model, completions = make_model(family), make_completions()
    own = model.config._attn_implementation
    attention = choose_attention(model, max_length=64)
    found = {budget: scores(model, completions, attention, budget) for budget in (13, 4096)}
    assert_as_exact_as_plain(model, completions, found, own)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("budget", [1, 2, 7, 50])
def test_chunks_of_every_size_give_the_same(budget: int) -> None:
    model, completions = make_llama(), make_completions()
    attention = choose_attention(model, max_length=64)
    whole = scores(model, completions, attention, 4096)
    for one, other in zip(scores(model, completions, attention, budget), whole, strict=True):
        assert np.abs(one - other).max() < 1e-5
