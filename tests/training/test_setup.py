"""Defaults that a run resolves: its learning rate."""

import json
from pathlib import Path

import pytest

from dpo_cache.errors import TrainingError
from dpo_cache.training.output.metrics_file import MetricsFile
from tests.training.test_loop import cut_off, metrics, train


def rates(run: Path) -> tuple[float | None, float, float]:
    """The option, the resolved value and the highest rate of a step."""
    config = json.loads((run / "config.json").read_text())
    highest = max(line["lr"] for line in metrics(run) if "loss" in line)
    return config["lr"], config["resolved"]["lr"], highest


def test_an_adapter_has_ten_times_the_learning_rate(cache: str, tmp_path: Path) -> None:
    whole = train(cache, tmp_path / "whole", lr=None)
    assert whole.finished and rates(tmp_path / "whole") == (None, 1e-6, 1e-6)
    train(cache, tmp_path / "lora", lr=None, lora_r=2)
    assert rates(tmp_path / "lora") == (None, 1e-5, 1e-5)
    train(cache, tmp_path / "further", lr=None, model=tmp_path / "lora" / "model")
    assert rates(tmp_path / "further") == (None, 1e-5, 1e-5)
    train(cache, tmp_path / "given", lr=3e-6, lora_r=2)
    assert rates(tmp_path / "given") == (3e-6, 3e-6, 3e-6)


@pytest.mark.parametrize("batch_size", [15, 8, 5])  # 1, 2 and 3 steps
def test_a_short_run_reaches_its_learning_rate(cache: str, tmp_path: Path, batch_size: int) -> None:
    train(cache, tmp_path / "run", lr=1e-4, batch_size=batch_size, warmup_ratio=1.0)
    assert rates(tmp_path / "run")[2] == 1e-4


def test_a_run_of_an_earlier_version_keeps_its_default(cache: str, tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"lora_r": 2, "save_every": 1}
    cut_off(cache, run, 2, lr=None, **options)
    config = json.loads((run / "config.json").read_text())
    del config["resolved"]["lr"]
    config["lr"] = 1e-6  # the default was the same with adapters
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match="lr: 1e-06 before, 1e-05 now"):
        train(cache, run, resume=True, lr=1e-5, **options)
    assert train(cache, run, resume=True, lr=None, **options).finished
    last = MetricsFile(run / "metrics.jsonl").last("loss")
    assert last is not None and 0 < last["lr"] < 1e-6


def test_another_learning_rate_is_named_when_a_run_is_resumed(cache: str, tmp_path: Path) -> None:
    cut_off(cache, tmp_path / "run", 2, lr=1e-4, save_every=1)
    with pytest.raises(TrainingError, match="lr: 0.0001 before, None now"):
        train(cache, tmp_path / "run", resume=True, lr=None, save_every=1)
