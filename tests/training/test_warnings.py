"""Remarks on runs that are short, or whose margin hardly moves."""

from pathlib import Path

import pytest

from dpo_cache.options.train import TrainOptions
from dpo_cache.training.warnings import RunWarnings, describe_few_steps
from tests.training.test_loop import metrics, train
from tests.training.test_run import step

HARDLY = (
    "the margin hardly moved, by {}: the policy is almost what it was. Try `lr` 1e-05 (it was 1e-06), or "
)
HARDLY += "more steps: more `epochs`, or a smaller `batch_size`."


@pytest.mark.parametrize(
    ("options", "num_pairs", "total_steps", "text"),
    [
        ({}, 160, 5, "the run has 5 steps; a policy learns little in fewer than 50. For more steps: `batch_size` 3 or `epochs` 10."),
        ({}, 12, 1, "the run has 1 step; a policy learns little in fewer than 50. For more steps: `batch_size` 1 or `epochs` 50."),
        ({"max_steps": 5}, 6400, 5, "the run has 5 steps; a policy learns little in fewer than 50. For more steps: `max_steps` 50."),
        ({"batch_size": 1}, 20, 20, "the run has 20 steps; a policy learns little in fewer than 50. For more steps: `epochs` 3."),
    ],
)  # fmt: skip
def test_a_short_run_is_told_what_makes_it_longer(
    options: dict, num_pairs: int, total_steps: int, text: str
) -> None:
    found = describe_few_steps(
        TrainOptions(cache="cache", output="run", **options), num_pairs, total_steps, 1e-6
    )
    assert found == f"{text} For larger steps: `lr` 1e-05."
    given = TrainOptions(cache="cache", output="run", lr=3e-4, **options)
    assert describe_few_steps(given, num_pairs, total_steps, 3e-4) == text  # a chosen rate is left as it is


@pytest.mark.parametrize("num_steps", [3, 49, 50])
def test_the_remark_is_on_runs_of_under_50_steps(cache: str, tmp_path: Path, num_steps: int) -> None:
    remarks: list[str] = []
    train(
        cache, tmp_path / "run", batch_size=1, epochs=9.0, max_steps=num_steps, step_zero="off",
        log=remarks.append,
    )  # fmt: skip
    assert sum("; a policy learns little" in remark for remark in remarks) == (num_steps < 50)


def evaluation(margin: float) -> dict:
    return {"step": 0, "eval/loss": 0.69, "eval/rewards/margins": margin, "eval/rewards/accuracies": None}


def conclude(margins: list[float], *evaluations: float, beta: float = 0.1, **options: bool) -> list[str]:
    remarks: list[str] = []
    warnings = RunWarnings(remarks.append, is_logistic=False, **options)
    for number, margin in enumerate(margins):
        warnings.note(step(number, **{"rewards/margins": margin}))
    before, after = [evaluation(margin) for margin in evaluations] or (None, None)
    warnings.conclude(before, after, beta=beta, lr=1e-6)
    return remarks


def test_a_margin_that_hardly_moved_is_reported_with_what_to_change() -> None:
    assert conclude([0.0] * 5 + [0.002] * 5, 0.0, 0.0021) == [HARDLY.format("+0.0021")]
    assert conclude([0.0, 0.0, 0.0005]) == [HARDLY.format("+0.0005")]
    assert conclude([0.0], 0.0, -0.003) == [HARDLY.format("-0.0030")]
    # a policy that starts as another model than the reference
    assert conclude([0.5, 0.5, 0.501]) == [HARDLY.format("+0.0010")]


def test_a_margin_that_moved_is_not_reported() -> None:
    assert conclude([0.0, 0.0, 0.1, 0.3], 0.0, 0.3) == []
    assert conclude([0.0] * 5 + [0.1] * 5, 0.0, 0.001) == []  # it learned the training pairs
    assert conclude([0.0, 0.0], 0.0, 0.05) == []
    assert conclude([0.0, 0.0]) == [] and conclude([0.0]) == []  # measured before any change
    assert conclude([0.0] * 5 + [0.01] * 5, beta=0.01) == []  # a whole nat
    assert conclude([0.0] * 9, prefers=False) == []  # the loss compares no answers


def test_a_run_that_hardly_moves_says_so_at_its_end(cache: str, tmp_path: Path) -> None:
    for lr in (1e-9, 1e-3):
        remarks: list[str] = []
        run = tmp_path / str(lr)
        report = train(
            cache, run, lr=lr, warmup_ratio=0.0, epochs=3.0, eval_pairs="heldout", log=remarks.append
        )
        hardly = [remark for remark in remarks if remark.startswith("the margin hardly moved")]
        assert len(hardly) == (lr == 1e-9)
        assert not hardly or hardly == report.remarks[-1:]
        accuracies = [line["rewards/accuracies"] for line in metrics(run) if "loss" in line]
        evaluated = [line["eval/rewards/accuracies"] for line in metrics(run) if "eval/loss" in line]
        assert accuracies[0] is None and evaluated[0] is None  # JSON has null
        assert (accuracies[-1] is None, evaluated[-1] is None) == (lr == 1e-9, lr == 1e-9)
