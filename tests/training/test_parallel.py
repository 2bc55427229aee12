"""Which policies have weights that a backward pass may leave without a gradient."""

import torch

from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.training.parallel import has_unused_weights
from tests.conftest import make_llama
from tests.lm.families import make_model

ROWS = AttentionChoice("rows", "")


def test_weights_that_are_not_used_are_found() -> None:
    assert not has_unused_weights(PolicyModel(make_llama(), ROWS))
    assert has_unused_weights(PolicyModel(make_model("mixtral"), ROWS)), "experts may not be chosen"
    model = make_llama()
    model.unused = torch.nn.Parameter(torch.zeros(2))
    assert has_unused_weights(PolicyModel(model, ROWS))
    model.unused.requires_grad = False
    assert not has_unused_weights(PolicyModel(model, ROWS))
    assert all(one.grad is None for one in model.parameters())
