"""Memory that `dpo-cache plan` predicts, compared with the peaks of torch's allocator, on a small real model.

    plan.py --model MODEL --data FILE [--rows N] [--only NAME]

Each configuration is a run on the CPU in float32: its weights, and all that two whole steps of `train`, or
the scoring of all completions, allocate above them. Linear layers are torch's own, as on a GPU, and the
checks before a run are left out.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dpo_cache
from dpo_cache.lm import runner
from dpo_cache.lm.forest.attention import use_forest_attention
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.runner import open_runner
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.train import TrainOptions
from dpo_cache.planning.counts import Counts
from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.planning.parts import Method
from dpo_cache.planning.placed import measure_model
from dpo_cache.planning.scoring import ScoringCounts
from dpo_cache.planning.ways import Candidates, methods_of
from dpo_cache.planning.workload import read_workload
from dpo_cache.training import inputs
from dpo_cache.training import setup as setup_module
from dpo_cache.training.batches import longest_pairs
from dpo_cache.training.gradient_check import GradientCheck
from dpo_cache.training.layer_major import LayerMajorModel
from dpo_cache.training.setup import open_setup
from dpo_cache.training.step import TrainingStep

FULL = {"batch_size": 3, "memory": "fast", "budget_tokens": "256"}
LORA = {**FULL, "lora_r": 16}
BY_LAYER = {"memory": "auto", "place": "weights=device"}  # on a CPU, all placements but gradients=none
TRAINING: dict[str, dict[str, Any]] = {
    "full, none": {**FULL, "gradient_checkpointing": "none"},
    "full, cheap": {**FULL, "gradient_checkpointing": "cheap"},
    "full, selective": {**FULL, "gradient_checkpointing": "selective"},
    "full, full": {**FULL, "gradient_checkpointing": "full"},
    "full, cheap, in one forest": {**FULL, "gradient_checkpointing": "cheap", "budget_tokens": "1024"},
    "full, cheap, Adafactor": {**FULL, "gradient_checkpointing": "cheap", "optimizer": "adafactor"},
    "LoRA, none": {**LORA, "gradient_checkpointing": "none"},
    "LoRA, cheap": {**LORA, "gradient_checkpointing": "cheap"},
    "LoRA, full": {**LORA, "gradient_checkpointing": "full"},
    "full, layer-major": {**FULL, **BY_LAYER},
    "full, layer-major, gradients=none": {
        **FULL,
        **BY_LAYER,
        "place": "gradients=none",
        "max_grad_norm": 0.0,
    },
    "LoRA, layer-major": {**LORA, **BY_LAYER},
}
SCORING = {"scoring, 512 tokens at once": 512, "scoring, 1,024 tokens at once": 1024}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--only")
    arguments = parser.parse_args()
    setup_module._decided_linear = lambda *_, **__: "torch"
    runner.prepared = partial(runner.prepared, linear="torch")
    inputs._choose_attention = lambda *_: AttentionChoice("forest", "not checked here", has_plain_head=True)
    GradientCheck.problem = lambda *_: ""
    LayerMajorModel.problem = lambda *_, **__: ""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        dpo_cache.precompute(
            arguments.model, arguments.data, cache, name="rows", limit=arguments.rows, max_length=160
        )
        print("| run | predicted, MB | measured, MB | predicted / measured |\n|---|---|---|---|")
        for name, tokens in SCORING.items():
            if arguments.only in (None, name):
                show(
                    name,
                    predict_scoring(arguments.model, cache, tokens),
                    score(arguments.model, cache, tokens),
                )
        for name, options in TRAINING.items():
            if arguments.only in (None, name):
                show(
                    name,
                    predict_training(arguments.model, cache, options),
                    train(arguments.model, cache, options),
                )


def show(name: str, predicted: int, measured: int) -> None:
    print(
        f"| {name} | {predicted / 1e6:,.1f} | {measured / 1e6:,.1f} | {predicted / measured:.3f} |",
        flush=True,
    )


def predict_training(model: str, cache: Path, options: dict[str, Any]) -> int:
    chosen = PlanOptions(model=model, cache=str(cache), device="cpu", precision="fp32", **options)
    config = load_config(model)
    counts = Counts(config, read_workload(chosen, config.vocab_size), "cpu")
    candidates = Candidates(counts, chosen, methods_of(chosen)[0], 0.0)
    way = next(candidates.variants(*candidates.presets()[0]))
    return way.device.total + way.host.total


def train(model: str, cache: Path, options: dict[str, Any]) -> int:
    """Bytes of the weights, and the peak above them of two steps on the longest pairs, as a dry run takes."""
    chosen = TrainOptions(
        cache=str(cache), output=str(cache / "run"), model=model, device="cpu", precision="fp32", **options
    )
    with open_setup(chosen, lambda _: None) as setup:
        step = TrainingStep(setup, setup.policy_model(), None)
        pairs = longest_pairs(setup.data.pairs, setup.data.selected, chosen.batch_size)
        use_forest_attention(setup.policy.model)
        weights = sum(parameter.nbytes for parameter in setup.policy.model.parameters())
        gc.collect()

        def two_steps() -> None:
            for number in (1, 2):
                step.take(pairs, number, 1e-6)

        return weights + allocated_peak(two_steps)


def predict_scoring(model: str, cache: Path, tokens: int) -> int:
    config, method = load_config(model), Method("fp32", optimizer="none")
    workload = read_workload(PlanOptions(model=model, cache=str(cache)), config.vocab_size)
    counts = ScoringCounts(config, measure_model(config, method), workload.scored, method.dtype, "cpu")
    return counts.resident(tokens).total


def score(model: str, cache: Path, tokens: int) -> int:
    pairs = [scored.pair for scored in dpo_cache.open_cache(cache).choose_pairs(None, "to score")]
    completions = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    opened = open_runner(
        model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_length=max(map(len, completions)),
        budget_tokens=tokens,
    )
    with opened as found:
        weights = sum(parameter.nbytes for parameter in found.model.parameters())
        gc.collect()

        def run() -> None:
            for _ in found.score(completions, rows_of=lambda index: [index]):
                pass

        return weights + allocated_peak(run)


if __name__ == "__main__":
    main()
