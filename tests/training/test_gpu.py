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
