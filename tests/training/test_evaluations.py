"""When a run evaluates, which evaluation is the best, and when it has had enough."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import dpo_cache
from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.training.evaluations import Best, schedule_of
from tests.conftest import chat_rows, write_rows
from tests.training.test_loop import Killed, comparable, metrics, train, weights

# a squared loss overshoots and comes back: the last evaluation is not the best
LEARNING = {
    "loss": "ipo",
    "eval_pairs": "heldout",
    "eval_every": 1,
    "lr": 1e-3,
    "warmup_ratio": 0.0,
    "max_steps": 8,
    "epochs": 9.0,
}


@pytest.mark.parametrize(
    ("value", "due"),
    [
        (None, []), ("3", [3, 6, 9]), ("epoch", [4, 8]), ("1epoch", [4, 8]), ("0.5epochs", [2, 4, 6, 8]), ("0.4 epochs", [2, 4, 5, 7, 8]),
        ("1.5epochs", [6]), ("0.1epoch", list(range(1, 10))),
    ],
)  # fmt: skip
def test_evaluations_are_due_by_steps_or_epochs(value: str | None, due: list[int]) -> None:
    schedule = schedule_of("`eval_every`", value, steps_per_epoch=4)
    assert [step for step in range(1, 10) if schedule.is_due(step)] == due
    assert schedule.count(1, 9) == len(due)


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "epochs2", "0epochs", "often", ""])
def test_periods_without_sense_are_refused(value: str) -> None:
    with pytest.raises(
        OptionError,
        match=r"`eval_every` .*: expected a number of steps above 0, or of epochs as in 0.5epochs",
    ):
        schedule_of("`eval_every`", value, 4)


def test_the_best_is_strictly_better_and_counts_later_evaluations() -> None:
    best = Best("accuracy")
    noted = [
        best.note({"step": step, "eval/rewards/accuracies": value})
        for step, value in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6), (5, 0.8))
    ]
    assert noted == [True, True, False, False, True] and (best.step, best.value, best.num_worse) == (
        5,
        0.8,
        0,
    )
    unknown = Best("accuracy")  # margins are rounding noise
    assert not unknown.note({"step": 1, "eval/rewards/accuracies": None}) and unknown.num_worse == 0
    assert unknown.note({"step": 2, "eval/rewards/accuracies": 0.4})
    assert not unknown.note({"step": 3, "eval/rewards/accuracies": None}) and unknown.num_worse == 1
    assert unknown.is_better_than({"step": 0, "eval/rewards/accuracies": None})
    lower = Best("loss")
    assert [
        lower.note({"step": step, "eval/loss": value}) for step, value in ((1, 0.5), (2, 0.6), (3, 0.4))
    ] == [True, False, True]
    assert lower.is_better_than({"step": 0, "eval/loss": 0.41}) and not lower.is_better_than(
        {"step": 0, "eval/loss": 0.4}
    )
    assert Best(**asdict(best)) == best


def test_the_model_of_the_best_evaluation_is_kept_beside_the_last(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", **LEARNING)
    losses = {
        line["step"]: line["eval/loss"]
        for line in metrics(tmp_path / "run")
        if "eval/loss" in line and line["step"]
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < 8, "the last evaluation must not be the best"
    assert report.best == {"measure": "loss", "step": best, "value": losses[best], "num_worse": 8 - best}
    assert report.best_model == str(tmp_path / "run/best") and report.num_steps == 8
    short = train(
        cache,
        tmp_path / "short",
        should_stop=lambda: len(metrics(tmp_path / "short")) >= 2 * best + 1,
        **LEARNING,
    )
    stopped = (
        weights(next((tmp_path / "short/checkpoints").iterdir()))
        if not short.finished
        else weights(short.model)
    )
    kept = weights(tmp_path / "run/best")
    assert all(torch.equal(value, stopped[name]) for name, value in kept.items())
    assert not all(torch.equal(value, kept[name]) for name, value in weights(report.model).items())


def test_patience_ends_a_run_with_the_best_model(cache: str, tmp_path: Path) -> None:
    whole = train(cache, tmp_path / "whole", **LEARNING)
    report = train(cache, tmp_path / "run", patience=2, **LEARNING)
    assert whole.best is not None and report.best is not None and report.best["step"] == whole.best["step"]
    assert report.finished and report.stopped_by_patience and report.num_steps == report.best["step"] + 2
    assert report.eval_after is not None and report.eval_after["step"] == report.best["step"]
    kept, best = weights(report.model), weights(tmp_path / "whole/best")
    assert all(torch.equal(value, best[name]) for name, value in kept.items())
    assert not (tmp_path / "run/best").exists() and report.best_model is None


@pytest.mark.rotating(3)
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_patience_and_the_best_survive_a_crash(cache: str, tmp_path: Path, cut: int) -> None:
    options = {"patience": 2, "save_every": 1, **LEARNING}
    train(cache, tmp_path / "whole", **options)

    def crash(line: dict) -> None:
        if line["step"] == cut and "eval/loss" in line:
            raise Killed

    with pytest.raises(Killed):
        train(cache, tmp_path / "cut", on_metrics=crash, **options)
    report = train(cache, tmp_path / "cut", resume=True, **options)
    assert report.stopped_by_patience and comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    one, other = weights(tmp_path / "whole/model"), weights(report.model)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_another_rhythm_of_evaluations_would_find_another_best(cache: str, tmp_path: Path) -> None:
    def crash(line: dict) -> None:
        if line["step"] == 4 and "eval/loss" in line:
            raise Killed

    with pytest.raises(Killed):
        train(cache, tmp_path / "run", on_metrics=crash, save_every=3, **LEARNING)
    with pytest.raises(TrainingError, match="eval_every: 1 before, 7 now"):
        train(cache, tmp_path / "run", resume=True, save_every=3, **{**LEARNING, "eval_every": 7})
    train(cache, tmp_path / "run", resume=True, save_every=2, **LEARNING)


def test_a_run_that_only_got_worse_logs_it(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "run", log=remarks.append, **{**LEARNING, "lr": 1e-2, "max_steps": 2})
    assert "no evaluation was better than the one before training." in remarks


def test_evaluation_pairs_that_are_trained_on_are_counted(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "same", eval_pairs="pairs", max_steps=1, log=remarks.append)
    assert (
        "15 of 15 evaluation pairs have prompts that are also trained on: those are not held out." in remarks
    )
    remarks.clear()
    train(cache, tmp_path / "other", eval_pairs="heldout", max_steps=1, log=remarks.append)
    assert not any("evaluation pairs" in remark for remark in remarks)


def test_other_answers_to_prompts_that_are_trained_on_are_not_held_out(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in chat_rows(5)]
    other = write_rows(tmp_path / "swapped.jsonl", rows)
    dpo_cache.precompute(model_folder, other, cache)
    remarks: list[str] = []
    report = train(cache, tmp_path / "run", eval_pairs="swapped", max_steps=1, log=remarks.append)
    assert "5 of 5 evaluation pairs have prompts that are also trained on: those are not held out." in remarks
    assert "held-out pairs" not in (Path(report.model) / "README.md").read_text()
