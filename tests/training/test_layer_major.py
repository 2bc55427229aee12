"""Runs layer by layer end like plain runs: under every placement, for full models and adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cache.errors import OptionError
from tests.training.test_loop import metrics, train, weights

STEPS = {"max_steps": 3, "budget_tokens": "100", "lr": 1e-4}  # several forests a step


def assert_same_runs(one: Path, other: Path, *, tolerance: float = 1e-5) -> None:
    """Losses and weights agree up to rounding."""
    for found, expected in zip(metrics(one), metrics(other), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    found_weights, expected_weights = weights(one / "model"), weights(other / "model")
    assert found_weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        assert torch.allclose(found_weights[name], expected, rtol=tolerance, atol=tolerance), name


PLACES: list[dict[str, Any]] = [
    {"place": "weights=device"},
    {"place": "gradients=host,inputs=host"},
    {"memory": "small"},
    {"memory": "least", "max_grad_norm": 0.0},
]


@pytest.mark.parametrize("adapter", [{}, {"lora_r": 2}], ids=["full", "lora"])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_a_run_layer_by_layer_ends_like_a_plain_run(
    cache: str, tmp_path: Path, places: dict[str, Any], adapter: dict[str, Any]
) -> None:
    norm = {"max_grad_norm": 0.0} if places.get("memory") == "least" else {}
    train(cache, tmp_path / "plain", memory="fast", **STEPS, **adapter, **norm)
    train(cache, tmp_path / "layers", **{**STEPS, **adapter, **places})
    assert_same_runs(tmp_path / "layers", tmp_path / "plain")


@pytest.mark.parametrize(
    "loss",
    [{"loss": ("ipo",)}, {"loss": ("aot",)}, {"wpo": "clipped"}, {"loss": ("sigmoid:0.5", "sft:0.5")}],
    ids=str,
)
def test_every_kind_of_loss(cache: str, tmp_path: Path, loss: dict[str, Any]) -> None:
    """Some compare the pairs of a step with each other, and some need more of the head."""
    train(cache, tmp_path / "plain", memory="fast", **STEPS, **loss)
    train(cache, tmp_path / "layers", place="inputs=host", **STEPS, **loss)
    assert_same_runs(tmp_path / "layers", tmp_path / "plain")


def test_a_pair_that_is_split_into_its_answers(cache: str, tmp_path: Path) -> None:
    options = {**STEPS, "budget_tokens": "20"}
    train(cache, tmp_path / "plain", memory="fast", **options)
    train(cache, tmp_path / "layers", place="inputs=host", **options)
    assert_same_runs(tmp_path / "layers", tmp_path / "plain")


def test_evaluations_and_a_resumed_run(cache: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **STEPS,
        "eval_pairs": "heldout",
        "eval_every": "1",
        "save_every": "2",
        "place": "gradients=host,inputs=host",
    }
    train(cache, tmp_path / "whole", **options)
    stops = iter([False, True])
    train(cache, tmp_path / "cut", should_stop=lambda: next(stops), **options)
    train(cache, tmp_path / "cut", resume=True, **options)
    for name, expected in weights(tmp_path / "whole/model").items():
        assert torch.equal(weights(tmp_path / "cut/model")[name], expected)


def test_gradients_that_are_dropped_cannot_be_clipped(cache: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Give `max_grad_norm` 0"):
        train(cache, tmp_path / "run", place="gradients=none")
