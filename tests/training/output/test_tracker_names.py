"""Metrics under the names of TRL and of the original DPO repository."""

import re
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.training.output.tracker_names import tracked_names

STEP = {
    "step": 3, "epoch": 0.5, "loss": 0.6, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/accuracies": 0.75, "rewards/margins": 0.2,
    "logps/chosen": -30.0, "logps/rejected": -40.0, "loss/sft": 1.5, "aux_loss": 2.0, "grad_norm": 4.0, "lr": 1e-5, "num_pairs": 8, "num_tokens": 900,
    "pairs_per_s": 5.5, "peak_bytes": 10**9,
}  # fmt: skip
EVAL = {
    "step": 3,
    "eval/loss": 0.6,
    "eval/rewards/accuracies": 0.75,
    "eval/logps/chosen": -30.0,
    "eval/loss/sft": 1.5,
    "eval/num_pairs": 8,
}
SHARED = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "aux_loss",
    "grad_norm",
)


def names(line: dict, log_names: str, tracker: str = "tensorboard") -> dict:
    return tracked_names(line, log_names, tracker, epoch=0.5, num_examples=24)


def test_trl_names_of_a_step() -> None:
    expected = {f"train/{name}": STEP[name] for name in SHARED} | {
        "train/learning_rate": 1e-5, "train/epoch": 0.5, "train/loss/sft": 1.5, "train/num_pairs": 8, "train/tokens_run": 900,
        "train/pairs_per_s": 5.5, "train/peak_bytes": 10**9,
    }  # fmt: skip
    assert names(STEP, "trl") == expected
    for tracker in ("wandb", "trackio"):
        assert names(STEP, "trl", tracker) == {**expected, "train/global_step": 3}
    assert names(STEP, "trl", "mlflow") == {
        name.removeprefix("train/"): value for name, value in expected.items()
    }


def test_trl_names_of_an_evaluation() -> None:
    expected = {
        "eval/loss": 0.6,
        "eval/rewards/accuracies": 0.75,
        "eval/logps/chosen": -30.0,
        "eval/loss/sft": 1.5,
        "eval/num_pairs": 8,
    }
    assert names(EVAL, "trl") == {**expected, "train/epoch": 0.5}
    assert names(EVAL, "trl", "wandb") == {**expected, "train/epoch": 0.5, "train/global_step": 3}
    assert names(EVAL, "trl", "mlflow") == {
        **{name.replace("eval/", "eval_", 1): value for name, value in expected.items()},
        "epoch": 0.5,
    }


def test_original_names() -> None:
    assert names(STEP, "original") == {
        "rewards_train/chosen": 0.1, "rewards_train/rejected": -0.1, "rewards_train/accuracies": 0.75, "rewards_train/margins": 0.2,
        "logps_train/chosen": -30.0, "logps_train/rejected": -40.0, "loss/train": 0.6, "loss_train/sft": 1.5, "grad_norm": 4.0,
        "examples_per_second": 5.5, "counters/examples": 24, "counters/updates": 3,
        "aux_loss": 2.0, "lr": 1e-5, "num_pairs": 8, "num_tokens": 900, "peak_bytes": 10**9, "epoch": 0.5,
    }  # fmt: skip
    assert names(EVAL, "original") == {
        "rewards_eval/accuracies": 0.75, "logps_eval/chosen": -30.0, "loss/eval": 0.6, "loss_eval/sft": 1.5, "eval/num_pairs": 8,
    }  # fmt: skip


def test_only_numbers_are_sent() -> None:
    assert "train/note" not in names({**STEP, "note": "text"}, "trl")


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    page = (Path(dpo_cache.__file__).parents[1] / "docs" / "tracking.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|", page, re.M)
    assert len(rows) >= len(STEP) + 4
    for name, trl, trl_in_mlflow, original in rows:
        line = {
            "step": 3,
            "eval/loss" if name.startswith("eval/") else "loss": 0.5,
            **({} if name == "step" else {name: 0.25}),
        }
        if name == "step":  # it is the x axis; some get it as a metric, too
            found = [names(line, "trl", "wandb").get(trl), names(line, "original").get(original)]
            assert found == [3, 3]
            continue
        for log_names, tracker, expected in (
            ("trl", "tensorboard", trl),
            ("trl", "mlflow", trl_in_mlflow),
            ("original", "wandb", original),
        ):
            value = 0.5 if name == "epoch" and log_names == "trl" else 0.25
            assert names(line, log_names, tracker).get(expected) == value, name


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_step_is_no_metric_where_it_is_the_axis(tracker: str) -> None:
    assert not any("global_step" in name for name in names(STEP, "trl", tracker))
