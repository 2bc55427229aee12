"""However the pairs of a step are run, its gradient is one and the same."""

from pathlib import Path

import pytest
import torch

from dpo_cache.lm import policy
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.training.gradient_check import GradientCheck
from tests.training.test_loop import assert_alike, metrics, train


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
