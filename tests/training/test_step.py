"""However the pairs of a step are run, its gradient is one and the same."""

from pathlib import Path

import pytest
import torch

from dpo_cache.lm import policy
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.policy import count_tokens
from dpo_cache.store import open_cache
from dpo_cache.training.gradient_check import GradientCheck
from dpo_cache.training.step_zero import StepZero
from tests.training.test_loop import assert_alike, metrics, train


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "aot"},
        {"loss": ("sigmoid", "sft_norm:0.5"), "ld_alpha": 0.4},
        {"wpo": "clipped", "loss": "nca_pair"},
    ],
)
def test_a_pair_that_is_too_long_is_run_one_answer_at_a_time(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    shared = {"batch_size": 5, "max_steps": 2, "lr": 1e-4, "eval_pairs": "heldout", **options}
    shared["step_zero"] = "off"  # its sample is run, too, and so is the pair of the gradient check
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")
    remarks: list[str] = []
    train(cache, tmp_path / "whole", budget_tokens="100000", **shared)
    run, sizes = policy.completion_logps, []

    def note(model, completions, attention, **extra):
        sizes.append((torch.is_grad_enabled(), len(completions), count_forest_tokens(completions)))
        return run(model, completions, attention, **extra)

    monkeypatch.setattr(policy, "completion_logps", note)
    train(cache, tmp_path / "split", budget_tokens="20", log=remarks.append, **shared)
    assert {count for _, count, _ in sizes} == {1} and sum(
        with_gradient for with_gradient, _, _ in sizes
    ) == 2 * 5 * 2
    assert sum("one answer at a time" in remark for remark in remarks) == 1
    assert len(metrics(tmp_path / "whole")) == 4
    assert_alike(metrics(tmp_path / "whole"), metrics(tmp_path / "split"))


def test_a_pair_above_the_default_is_run_whole_while_memory_lasts(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.training.step_memory.default_micro_tokens", lambda _: 64)
    run, sizes = policy.completion_logps, []

    def note(model, completions, attention, **extra):
        sizes.append(len(completions))
        if len(sizes) == 5:
            raise torch.OutOfMemoryError
        return run(model, completions, attention, **extra)

    monkeypatch.setattr(policy, "completion_logps", note)
    remarks: list[str] = []
    train(
        cache, tmp_path / "run", max_steps=3, batch_size=2, gradient_checkpointing="none", log=remarks.append
    )
    assert set(sizes[:5]) == {2} and 1 in sizes[5:]
    assert any(
        "with pairs of more than 64 tokens one answer at a time. Nothing is lost." in remark
        for remark in remarks
    )


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_less(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"batch_size": 5, "max_steps": 1, "lr": 1e-4, "eval_pairs": "heldout"}
    train(cache, tmp_path / "whole", **shared)
    run = policy.completion_logps

    def run_out(model, completions, attention, **extra):
        if not torch.is_grad_enabled() and len(completions) > 4:
            raise torch.OutOfMemoryError
        return run(model, completions, attention, **extra)

    monkeypatch.setattr(policy, "completion_logps", run_out)
    remarks: list[str] = []
    train(cache, tmp_path / "tight", log=remarks.append, **shared)
    assert any(remark.startswith("out of memory") for remark in remarks)
    whole, tight = (metrics(tmp_path / name)[0] for name in ("whole", "tight"))
    assert whole["eval/num_pairs"] == tight["eval/num_pairs"] and whole["eval/loss"] == pytest.approx(
        tight["eval/loss"], abs=1e-6
    )


# -- before the first update -------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each forward pass that no gradient follows: completions and tokens, in the order of the passes."""
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")
    run, found = policy.completion_logps, list[tuple[int, int]]()

    def note(model, completions, attention, **extra):
        if not torch.is_grad_enabled():
            found.append((len(completions), count_tokens(attention, completions)))
        return run(model, completions, attention, **extra)

    monkeypatch.setattr(policy, "completion_logps", note)
    return found


BUDGET = 64  # of these pairs, some fit
SHARED = {"budget_tokens": str(BUDGET), "batch_size": 2, "max_steps": 2, "lr": 1e-3, "log": lambda text: None}


def longest_answer(cache: str) -> int:
    pairs = open_cache(cache).pairs("pairs")
    return max(len(side) for scored in pairs for side in (scored.pair.chosen, scored.pair.rejected))


def check_sizes(forwards: list[tuple[int, int]], longest: int) -> None:
    """Each pass fits into the budget, or is one answer."""
    assert forwards and all(tokens <= BUDGET or number == 1 for number, tokens in forwards)
    assert max(tokens for _, tokens in forwards) <= max(BUDGET, longest)
    assert {number for number, _ in forwards} >= {1, 2}, "pairs that fit are run whole"


def test_the_sample_of_step_zero_is_run_within_the_budget(
    cache: str, tmp_path: Path, forwards: list[tuple[int, int]]
) -> None:
    train(cache, tmp_path / "run", **SHARED)
    check_sizes(forwards, longest_answer(cache))


def test_the_base_of_an_adapter_is_run_within_the_budget(
    cache: str, tmp_path: Path, forwards: list[tuple[int, int]]
) -> None:
    train(cache, tmp_path / "first", lora_r=2, **SHARED)
    forwards.clear()
    train(cache, tmp_path / "further", model=str(tmp_path / "first/model"), **SHARED)
    check_sizes(forwards, longest_answer(cache))


def test_a_sample_that_runs_out_of_memory_is_split_and_compared_once(
    cache: str, tmp_path: Path, forwards: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    note, compared, conclude = policy.completion_logps, list[int](), StepZero.conclude

    def run_out(model, completions, attention, **extra):
        if len(forwards) > 2 and count_tokens(attention, completions) > BUDGET:
            raise torch.OutOfMemoryError
        return note(model, completions, attention, **extra)

    monkeypatch.setattr(policy, "completion_logps", run_out)
    monkeypatch.setattr(
        StepZero, "conclude", lambda self: (compared.append(len(self.compared)), conclude(self))[1]
    )
    monkeypatch.setattr("dpo_cache.training.step_memory.default_micro_tokens", lambda _: BUDGET)
    train(cache, tmp_path / "run", **{**SHARED, "budget_tokens": "auto", "gradient_checkpointing": "full"})
    assert max(tokens for _, tokens in forwards) > BUDGET and all(
        tokens <= BUDGET for _, tokens in forwards[3:]
    )
    assert compared == [2 * len(open_cache(cache).pairs("pairs")) + 4], "the sample, and the first step"
