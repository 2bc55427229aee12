"""Modes of recomputation that give another gradient are found on a short pair, and not used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpo_cache.lm.forest import flex_call, varlen
from dpo_cache.lm.forest.kernels import KERNELS
from dpo_cache.lm.memory.recompute import MODES, Recomputation
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import AttentionChoice, choose_attention
from dpo_cache.training.gradient_check import GradientCheck, with_right_kernel
from dpo_cache.training.step_memory import StepMemory
from tests.conftest import make_llama
from tests.families.tiny import make_tiny


class CountingMLP(torch.nn.Module):
    """Returns another value each second time, as code that keeps a state between passes does."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.mlp, self.times = mlp, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.times += 1
        return self.mlp(hidden * (1 + self.times % 2))


def make_counting() -> torch.nn.Module:
    model = make_llama()
    model.model.layers[1].mlp = CountingMLP(model.model.layers[1].mlp)
    return model


def open_check(model: torch.nn.Module, **options: object) -> GradientCheck:
    attention = options.pop("attention", None) or AttentionChoice("rows", "")
    policy = PolicyModel(model, attention, **options)  # type: ignore[arg-type]
    return GradientCheck(policy, Recomputation(model))  # type: ignore[arg-type]


@pytest.mark.rotating(4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_modes_that_repeat_the_forward_pass_are_right(mode: str, precision: str, with_lora: bool) -> None:
    model = make_llama()
    if with_lora:
        add_adapter(model, lora_config(4, None, "all-linear"), seed=0)
    check = open_check(model, attention=choose_attention(model, max_length=64), precision=precision)
    assert check.problem(mode) == ""


def test_a_mode_whose_second_pass_is_another_is_found_and_leaves_nothing_behind() -> None:
    model = make_counting()
    check = open_check(model)
    check.recomputation.mode = "cheap"
    problem = check.problem("full")
    assert problem.startswith("gives another gradient than none (")
    assert check.recomputation.mode == "cheap"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_a_small_part_of_a_gradient_that_is_missing_is_found(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = open_check(make_llama())
    name, found = "model.layers.0.mlp.up_proj.weight", check._gradient("none")
    found[name].sums *= 1 - share
    assert name in check._compare(found)
    del found[name]
    assert name in check._compare(found)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_a_kernel_that_gives_another_gradient_is_not_used(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KERNELS, "cpu", ("varlen", "flex", "segments"))
    model, logged = make_llama(), []
    recomputation, attention = Recomputation(model), choose_attention(model, max_length=64)
    assert attention.kernel == "varlen"
    assert with_right_kernel(model, attention, recomputation, precision, pytest.fail) == attention
    real = varlen._Gather.backward
    monkeypatch.setattr(
        varlen._Gather, "backward", lambda ctx, grad: (real(ctx, grad)[0] * 0.9, None, None, None)
    )
    found = with_right_kernel(model, attention, recomputation, precision, logged.append)
    assert found == replace(attention, kernel="flex")
    assert len(logged) == 1 and "attention by varlen gives another gradient than segments (" in logged[0]
    monkeypatch.setattr(flex_call.FlexCall, "compute", fail)
    found = with_right_kernel(model, attention, recomputation, precision, logged.append)
    assert found.kernel == "segments"
    assert logged[2] == "attention by flex fails (no compiler) on a short pair, so it is not used."
    assert all(parameter.grad is None for parameter in model.parameters())


def fail(*_: object) -> None:
    raise RuntimeError("no compiler")


def test_gradients_of_a_step_that_did_not_fit_do_not_count() -> None:
    model = make_llama()
    check = open_check(model)
    assert check.problem("cheap") == ""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert check.problem("full") == ""
    assert all(parameter.grad is None for parameter in model.parameters())


def test_routers_count_if_the_objective_has_their_loss() -> None:
    model = make_tiny("qwen3_moe", output_router_logits=True)
    check = open_check(model, attention=choose_attention(model, max_length=64), with_routing=True)
    assert check.problem("full") == "" and check.problem("selective") == ""


def test_memory_that_ends_is_no_wrong_gradient_and_an_error_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, expected in (
        (torch.OutOfMemoryError("CUDA out of memory"), ""),
        (RuntimeError("a saved tensor was changed\nmore"), "fails (a saved tensor was changed)"),
    ):
        check = open_check(make_llama())

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(GradientCheck, "_gradient", fail)
        assert check.problem("full") == expected
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("requested", "right", "expected"),
    [
        ("selective", {"none", "cheap", "full"}, "full"),
        ("full", {"none", "cheap", "selective"}, "selective"),
        ("full", {"none"}, "none"),
        ("cheap", {"none", "cheap"}, "cheap"),
    ],
)
def test_a_run_takes_the_next_mode_that_is_right_and_says_so(
    requested: str, right: set[str], expected: str
) -> None:
    model, remarks = make_llama(), []
    memory = StepMemory(model, Recomputation(model), None, requested, remarks.append)
    memory.use_right_modes(lambda mode: "" if mode in right else "gives another gradient than none")
    assert memory.mode == expected
    if expected == requested:
        assert remarks == []
    else:
        assert remarks == [
            f"`gradient_checkpointing` {requested} gives another gradient than none on a short pair; "
            f"continuing with {expected}."
        ]


def test_memory_that_runs_out_leads_to_no_mode_that_is_wrong() -> None:
    model, remarks = make_llama(), []
    memory = StepMemory(model, Recomputation(model), None, "auto", remarks.append)
    assert memory.mode == "cheap"
    memory.use_right_modes(lambda mode: "is wrong" if mode == "full" else "")
    memory.save_more(torch.OutOfMemoryError())
    assert memory.mode == "cheap" and "one answer at a time" in remarks[0]


def test_forests_have_at_most_as_many_tokens_as_are_exact() -> None:
    model = make_llama()
    memory = StepMemory(model, Recomputation(model), 500, "none", lambda _: None, most_tokens=100)
    assert (memory.micro_tokens, memory.pair_tokens) == (100, 100)
    memory.restore({"requested": [500, "none"], "micro_tokens": 500, "pair_tokens": None, "mode": "none"})
    assert (memory.micro_tokens, memory.pair_tokens) == (100, 100)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("family", ["gemma3n_text", "gpt_oss", "qwen3_moe", "falcon"])
def test_each_mode_of_these_families_is_right(family: str) -> None:
    model = make_tiny(family)
    check = open_check(model, attention=choose_attention(model, max_length=64))
    assert {mode: check.problem(mode) for mode in MODES} == dict.fromkeys(MODES, "")
