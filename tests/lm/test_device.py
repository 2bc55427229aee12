"""The ways to compute of a GPU give the same numbers on a CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_cache.errors import ModelError
from dpo_cache.lm.device import (
    autocast,
    check_one_device,
    deterministic_algorithms,
    planning_device_type,
    simulate_device_type,
)
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.forest.plans import plan_tree
from dpo_cache.lm.policy import completion_logps, default_micro_tokens
from dpo_cache.lm.self_check import AttentionChoice
from tests.conftest import make_completions, make_llama
from tests.lm.families import make_model
from tests.lm.memory.test_recompute import gradients

COMPLETIONS = make_completions()
FOREST = AttentionChoice("forest", "", has_plain_head=True)


def test_sizes_are_those_of_the_other_device() -> None:
    cpu = torch.device("cpu")
    with simulate_device_type("cuda"):
        assert planning_device_type(cpu) == "cuda" and default_micro_tokens(cpu) == 4096
    assert planning_device_type(cpu) == "cpu" and default_micro_tokens(cpu) == 1024


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_what_cuda_runs_has_the_same_gradients(family: str) -> None:
    model = make_llama() if family == "llama" else make_model(family)
    use_forest_attention(model)
    attention = FOREST if family == "llama" else AttentionChoice("forest", "")
    expected = gradients(model, completion_logps(model, COMPLETIONS, attention).sums())
    with simulate_device_type("cuda"):
        found = gradients(model, completion_logps(model, COMPLETIONS, attention).sums())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-6, name


def test_a_gpu_runs_each_segment_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cache.lm.forest.segments.QUERY_TOKENS", 4)
    forest = build_forest(COMPLETIONS)
    assert (
        len(plan_tree(forest, "cuda").segments) == len(forest.starts) < len(plan_tree(forest, "cpu").segments)
    )


def test_mixed_precision_without_kept_copies_has_the_same_gradients() -> None:
    model = make_llama()
    use_forest_attention(model)

    def run(context) -> dict[str, torch.Tensor]:
        with context:
            logps = completion_logps(model, COMPLETIONS, FOREST)
        return gradients(model, logps.sums())

    expected, found = (
        run(torch.autocast("cpu", torch.bfloat16)),
        run(autocast(torch.device("cpu"), "bf16-mixed")),
    )
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    exact = run(autocast(torch.device("cpu"), "fp32"))
    assert any(not torch.equal(found[name], gradient) for name, gradient in exact.items())


@pytest.mark.parametrize("before", ["off", "warn", "on"])
@pytest.mark.parametrize("is_on", [False, True])
def test_a_users_own_determinism_comes_back(before: str, is_on: bool) -> None:
    def state() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    torch.use_deterministic_algorithms(before != "off", warn_only=before == "warn")
    try:
        own = state()
        with deterministic_algorithms(is_on):
            assert state() == ((True, False) if is_on else own)
        assert state() == own
        with pytest.raises(RuntimeError, match="inside"), deterministic_algorithms(is_on):
            raise RuntimeError("inside")
        assert state() == own
    finally:
        torch.use_deterministic_algorithms(False)


def test_determinism_that_is_off_keeps_what_the_block_sets() -> None:
    try:
        with deterministic_algorithms(False):
            torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_model_on_several_devices_is_refused_by_their_names() -> None:
    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(2, device=name)) for name in ("cuda:0", "cuda:1")]
        with pytest.raises(ModelError, match="ParameterList is spread over cuda:0, cuda:1; it can only be"):
            check_one_device(torch.nn.ParameterList(weights))
        check_one_device(torch.nn.ParameterList(weights[:1]))
    with pytest.raises(ModelError, match="has weights that are not in memory"):
        check_one_device(torch.nn.Linear(2, 2, device="meta"))
    check_one_device(torch.nn.Linear(2, 2))
