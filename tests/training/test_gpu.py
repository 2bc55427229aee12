"""A step of training on CUDA is the step that a CPU takes."""

from pathlib import Path

import pytest
import torch

from tests.training.test_loop import assert_alike, metrics, train, weights


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"lora_r": 4}, {"offload_activations": True}], ids=str)
def test_a_step_in_float32_is_that_of_the_cpu(cache: str, tmp_path: Path, options: dict) -> None:
    shared = {
        "precision": "fp32", "max_steps": 1, "batch_size": 4, "lr": 1e-3, "merge_adapter": "lora_r" in options,
    }  # fmt: skip
    for device in ("cpu", "cuda"):
        train(cache, tmp_path / device, device=device, **shared, **options)
    assert_alike(metrics(tmp_path / "cpu"), metrics(tmp_path / "cuda"))
    expected = weights(tmp_path / "cpu/model")
    for name, found in weights(tmp_path / "cuda/model").items():
        # Adam's first update is lr * sign(gradient): where a gradient is rounding only, its sign may differ
        gaps = (found - expected[name]).abs()
        assert gaps.max() <= 2.1e-3 and (gaps > 1e-5).float().mean() < 0.01, name
    assert torch.cuda.max_memory_allocated() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("adapter", [{}, {"lora_r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize(
    "places",
    [
        {"memory": "small"},
        {"memory": "least", "max_grad_norm": 0.0},
        {"place": "inputs=host"},
        {"memory": "small", "optimizer": "adamw-bf16"},
    ],
    ids=str,
)
def test_a_run_under_every_placement_is_the_plain_run(
    cache: str, tmp_path: Path, places: dict, adapter: dict, precision: str
) -> None:
    shared = {
        "device": "cuda", "precision": precision, "max_steps": 3, "batch_size": 4, "lr": 1e-4, "budget_tokens": "100",
        "step_zero": "warn", "rounding": "nearest" if precision == "bf16" else "auto",
    }  # fmt: skip
    rest = {name: value for name, value in places.items() if name not in ("memory", "place")}
    train(cache, tmp_path / "plain", **{**shared, **adapter, **rest, "memory": "fast"})
    train(cache, tmp_path / "placed", **{**shared, **adapter, **places})
    tolerance = 1e-4 if precision == "fp32" else 3e-2
    for found, expected in zip(metrics(tmp_path / "placed"), metrics(tmp_path / "plain"), strict=True):
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=tolerance), name
