"""Losses, gradients and metrics compared with TRL 1.16's own trainers: live where TRL is installed, from golden
values elsewhere.

DPO_CACHE_TRL_PYTHON=.venv-trl/bin/python python -m pytest tests.losses.test_parity_trl.py
python -m tests.losses.test_parity_trl .venv-trl/bin/python     # writes the golden values anew
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_cache.lm.policy import CompletionLogps
from dpo_cache.losses.objective import Objective
from dpo_cache.training.pair_logps import mean_chosen_tokens, policy_losses
from dpo_cache.types import Completion, Pair, Score, ScoredPair

GOLDEN = Path(__file__).parent / "golden" / "trl-1.16.json"
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "trl_losses.py"
INPUTS = ("random", "equal", "far_up", "far_down", "one_pair")


def dpo(
    *losses: str,
    weights: tuple[float, ...] = (),
    trl: dict | None = None,
    inputs: tuple[str, ...] = INPUTS,
    dtype: str = "float64",
    **ours: Any,
):
    """A case for DPOTrainer: the names that TRL has for the losses, what else it is set to, and our settings
    where they differ.
    """
    names = {"ipo": "ipo_norm"}
    terms = {
        names.get(name, name): weight
        for name, weight in zip(losses, weights or [1.0] * len(losses), strict=True)
    }
    shared = {
        name: value
        for name, value in ours.items()
        if name in ("beta", "label_smoothing", "ld_alpha", "discopop_tau")
    }
    settings = {"loss_types": list(losses), "loss_weights": list(terms.values()), **shared, **(trl or {})}
    return {
        "trainer": "dpo",
        "trl": settings,
        "ours": {"terms": terms, **ours},
        "inputs": inputs,
        "dtype": dtype,
    }


def cpo(loss_type: str, name: str, dtype: str = "float64", inputs: tuple[str, ...] = INPUTS, **ours: Any):
    trl = {
        "loss_type": loss_type,
        **{key: value for key, value in ours.items() if key != "router_coefficient"},
    }
    return {
        "trainer": "cpo",
        "trl": trl,
        "ours": {"terms": {name: 1.0}, **ours},
        "inputs": inputs,
        "dtype": dtype,
    }


CASES: dict[str, dict[str, Any]] = {
    "sigmoid": dpo("sigmoid"),
    "sigmoid, beta 0.5": dpo("sigmoid", beta=0.5),
    "hinge": dpo("hinge"),
    "ipo": dpo("ipo", beta=0.2),
    "exo_pair": dpo("exo_pair", label_smoothing=0.001),
    "nca_pair": dpo("nca_pair"),
    "robust": dpo("robust", label_smoothing=0.1),
    "bco_pair": dpo("bco_pair"),
    "sppo_hard": dpo("sppo_hard"),
    "aot": dpo("aot"),
    "aot, smoothed": dpo("aot", label_smoothing=0.2),
    "aot_unpaired": dpo("aot_unpaired", label_smoothing=0.1),
    "apo_zero": dpo("apo_zero"),
    "apo_down": dpo("apo_down"),
    # far down TRL's is infinity times zero
    "discopop": dpo("discopop", inputs=("random", "equal", "far_up", "one_pair")),
    "discopop, tau 0.3": dpo("discopop", discopop_tau=0.3, inputs=("random", "equal")),
    "sigmoid_norm": dpo("sigmoid_norm", beta=2.0),
    "sft": dpo("sft"),
    "sigmoid and sft": dpo("sigmoid", "sft", weights=(0.8, 0.2)),
    "sigmoid, bco_pair and sft": dpo("sigmoid", "bco_pair", "sft", weights=(0.8, 0.2, 1.0)),
    "forward_kl": dpo("sigmoid", trl={"f_divergence_type": "forward_kl"}, f_divergence="forward_kl", inputs=("random", "equal", "one_pair")),
    "js_divergence": dpo("sigmoid", trl={"f_divergence_type": "js_divergence"}, f_divergence="js_divergence"),
    "js_divergence, ipo": dpo("ipo", trl={"f_divergence_type": "js_divergence"}, f_divergence="js_divergence"),
    # TRL has no alpha-divergence in float64
    "alpha_divergence": dpo("sigmoid", trl={"f_divergence_type": "alpha_divergence"}, f_divergence="alpha_divergence", dtype="float32"),
    "alpha_divergence 1.5": dpo(
        "hinge", trl={"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5}, f_divergence="alpha_divergence", f_alpha=1.5,
        dtype="float32", inputs=("random", "equal", "one_pair"),
    ),
    "alpha_divergence 1": dpo(
        "sigmoid", trl={"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, f_divergence="alpha_divergence", f_alpha=1.0
    ),
    "LD-DPO": dpo("sigmoid", ld_alpha=0.5),
    "LD-DPO, tails left out": dpo("sigmoid", ld_alpha=0.0),
    "LD-DPO, reference as it is": dpo("sigmoid", ld_alpha=0.5, ld_reference=False, trl={"precompute": True}),
    "LD-DPO, ipo": dpo("ipo", ld_alpha=0.3),
    "LD-DPO and sft": dpo("sigmoid", "sft", weights=(1.0, 0.5), ld_alpha=0.3),
    "WPO": dpo("sigmoid", wpo="on", trl={"use_weighting": True}, inputs=("random", "equal", "one_pair")),
    "WPO, sppo_hard": dpo("sppo_hard", wpo="on", trl={"use_weighting": True}, inputs=("random", "equal", "one_pair")),
    "cpo": cpo("sigmoid", "cpo", cpo_alpha=1.0),
    "cpo, without likelihood, smoothed": cpo("sigmoid", "cpo", cpo_alpha=0.0, label_smoothing=0.1),
    "simpo": cpo("simpo", "simpo", beta=2.0, simpo_gamma=1.0),
    "simpo, smoothed": cpo("simpo", "simpo", beta=2.5, simpo_gamma=0.5, label_smoothing=0.1),
    "slic": cpo("hinge", "slic", beta=0.3),
    # TRL computes the odds in float32
    "orpo": {
        "trainer": "orpo", "trl": {"beta": 0.25}, "ours": {"terms": {"orpo": 1.0}, "beta": 0.25}, "inputs": ("random", "equal"), "dtype": "float32",
    },
}  # fmt: skip


def make_inputs(kind: str) -> dict[str, list[list[float]]]:
    """Token log-probs of a few pairs, all chosen, then all rejected, in sixteenths, so that float32 adds them
    up exactly.

    `equal`: the policy is the reference. `far_up`, `far_down`: margins of about +10,000 and -10,000 nats.
    """
    generator = np.random.default_rng(INPUTS.index(kind))
    num_pairs = 1 if kind == "one_pair" else 7

    def logps(length: int, largest: float) -> list[float]:
        return (-np.ceil(generator.random(length) * largest * 16) / 16).tolist()

    lengths = [int(generator.integers(1, 9)) for _ in range(2 * num_pairs)]
    policy, reference, squares = (
        [logps(length, largest) for length in lengths] for largest in (6.0, 6.0, 3.0)
    )
    if kind == "equal":
        policy = reference
    if kind in ("far_up", "far_down"):
        for index in range(2 * num_pairs):
            is_chosen = index < num_pairs
            far = policy if is_chosen == (kind == "far_down") else reference
            far[index] = [value - 5000 / len(far[index]) // 1 for value in far[index]]
    return {"policy": policy, "reference": reference, "squares": squares}


def all_inputs() -> dict[str, dict[str, Any]]:
    """What the script is given, by case and kind of input."""
    return {
        f"{name} / {kind}": {
            "trainer": case["trainer"],
            "trl": case["trl"],
            "dtype": case["dtype"],
            **make_inputs(kind),
        }
        for name, case in CASES.items()
        for kind in case["inputs"]
    }


def run_trl(python: str, folder: Path) -> dict[str, Any]:
    """What TRL makes of all of them."""
    (folder / "cases.json").write_text(json.dumps(all_inputs()))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [python, str(SCRIPT), str(folder / "cases.json"), str(folder / "out.json")],
        check=True,
        env=environment,
    )
    return json.loads((folder / "out.json").read_text())


def run_ours(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The same through the objective that the training loop uses."""
    num_pairs = len(case["policy"]) // 2
    completions = [Completion(np.ones(1, np.uint32), np.ones(len(row), np.uint32)) for row in case["policy"]]
    scores = [Score(np.array(row, np.float64)) for row in case["reference"]]
    pairs = [
        ScoredPair(
            Pair(index, completions[index], completions[num_pairs + index]),
            scores[index],
            scores[num_pairs + index],
        )
        for index in range(num_pairs)
    ]
    flat = torch.tensor(
        [value for row in case["policy"] for value in row], dtype=torch.float64, requires_grad=True
    )
    squares = torch.tensor([value for row in case["squares"] for value in row], dtype=torch.float64)
    lengths = [len(row) for row in case["policy"]]
    parts = [(pairs, CompletionLogps(flat, lengths, squares))]
    found = policy_losses(Objective(**settings), parts, mean_chosen_tokens(pairs))
    found["loss"].mean().backward()
    assert flat.grad is not None
    return {
        "loss": found["loss"].mean().item(),
        "grads": [row.tolist() for row in flat.grad.split(lengths)],
        "metrics": {name: value.mean().item() for name, value in found.items()},
    }


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    python = os.environ.get("DPO_CACHE_TRL_PYTHON")
    return run_trl(python, tmp_path_factory.mktemp("trl")) if python else json.loads(GOLDEN.read_text())


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", all_inputs())
def test_losses_gradients_and_metrics_are_those_of_trl(trl: dict[str, Any], name: str) -> None:
    expected, found = trl[name], run_ours(all_inputs()[name], CASES[name.split(" / ")[0]]["ours"])
    assert np.isfinite(expected["loss"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-12)
    for one, other in zip(found["grads"], expected["grads"], strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9)
    for metric, value in expected["metrics"].items():
        if metric == "rewards/accuracies":  # a tie counts half; TRL counts it as wrong
            value += found["metrics"]["rewards/ties"] / 2
        assert found["metrics"][metric] == pytest.approx(value, rel=1e-6, abs=1e-12), metric


def test_every_loss_that_trl_has_is_among_the_cases() -> None:
    tested = {name for case in CASES.values() for name in case["trl"].get("loss_types", [])}
    assert tested == {
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        "discopop", "sigmoid_norm", "sft",
    }  # fmt: skip


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        results = run_trl(sys.argv[1], Path(scratch))
    results = json.loads(json.dumps(results), parse_float=lambda digits: float(f"{float(digits):.12g}"))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        "{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items())
        + "\n}\n"
    )
