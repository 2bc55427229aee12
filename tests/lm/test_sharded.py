"""Which models cannot be cut into shards; what cut models compute is in `tests/scale/test_fsdp.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpo_cache.errors import ModelError
from dpo_cache.lm.sharded import shard
from tests.conftest import make_llama


def with_scalar(model: torch.nn.Module) -> None:
    model.model.layers[1].mlp.scale = torch.nn.Parameter(torch.tensor(1.0))


def with_two_dtypes(model: torch.nn.Module) -> None:
    model.model.layers[0].mlp.up_proj.to(torch.bfloat16)


def with_two_dtypes_outside(model: torch.nn.Module) -> None:
    model.lm_head.to(torch.bfloat16)


def with_shared_layers(model: torch.nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def with_shared_norm(model: torch.nn.Module) -> None:
    model.model.norm.weight = model.model.layers[0].input_layernorm.weight


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (with_scalar, "model.layers.1.mlp.scale is one number"),
        (with_two_dtypes, "trained weights that are gathered together are in bfloat16 and float32"),
        (with_two_dtypes_outside, "trained weights that are gathered together are in bfloat16 and float32"),
        (with_shared_layers, "model.layers.1.mlp.up_proj.weight is shared with another layer"),
        (with_shared_norm, "model.layers.0.input_layernorm.weight is shared with another layer"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_before_anything_is_cut(
    change: Callable[[torch.nn.Module], None], problem: str
) -> None:
    model = make_llama()
    change(model)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ModelError) as caught:
        shard(model, torch.device("cpu"))
    assert str(caught.value) == (
        f"`parallel` fsdp: LlamaForCausalLM cannot be cut into shards: {problem}.\nUse `parallel` ddp."
    )
    assert [name for name, one in model.named_parameters() if type(one) is torch.nn.Parameter] == names
