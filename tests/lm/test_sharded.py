"""Which models cannot be cut into shards; what cut models compute is in `tests/scale/test_fsdp.py`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.lm.sharded import ShardedModel, shard
from tests.conftest import make_completions, make_llama
from tests.lm.families import make_model


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


def gradients(model: PreTrainedModel, sharded: ShardedModel | None) -> dict[str, torch.Tensor]:
    """Those of the log-probs of a few completions."""
    with nullcontext() if sharded is None else sharded.gathered():
        attention = choose_attention(model, max_length=60)
    policy = PolicyModel(model, attention, sharded=sharded)
    (logps,) = policy([make_completions()[:4]])
    logps.sums().sum().backward()
    return {name: one.grad for name, one in policy.trained.items() if one.grad is not None}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_layers_that_return_views_are_run_without_a_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors; those of OPT return views. One rank has all rows."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    expected = gradients(make_model(name), None)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make_model(name)
        found = gradients(model, shard(model, torch.device("cpu")))
    finally:
        destroy_process_group()
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        torch.testing.assert_close(found[path], gradient, rtol=1e-5, atol=1e-6)
