"""One policy-only training run from a cache, for `train.py`: losses, gradient norms, seconds and memory.

our_training.py CACHE OUT.json --batch-size N [--lora-r N] [option=value ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import dpo_cache
from dpo_cache.lm.device import peak_resident_bytes
from dpo_cache.lm.forest.layout import build_forest
from dpo_cache.lm.memory.recompute import Recomputation
from dpo_cache.lm.model.adapter import add_adapter, lora_config
from dpo_cache.lm.model.load import load_model
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.planning.footprint import pass_bytes
from dpo_cache.training import loop  # noqa: F401  (imported before the process's memory is measured)
from dpo_cache.training.batches import completions_of, split_step
from dpo_cache.types import ScoredPair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lora-r", type=int)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    options: dict[str, Any] = dict(entry.split("=", 1) for entry in arguments.options)
    if arguments.lora_r:
        options["lora_r"] = arguments.lora_r
    process_bytes = peak_resident_bytes()
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as output:
        report = dpo_cache.train(
            arguments.cache, f"{output}/run", device="cpu", precision="fp32", beta=0.1, lr=1e-5, lr_schedule="constant", warmup_ratio=0.0,
            weight_decay=0.0, max_grad_norm=1.0, shuffle=False, batch_size=arguments.batch_size, on_metrics=steps.append, **options,
        )  # fmt: skip
    pairs = list(dpo_cache.open_cache(arguments.cache).pairs("rows"))
    parts = floor(report, pairs, arguments.batch_size, process_bytes, arguments.lora_r)
    found = {
        "floor": parts,
        "floor_bytes": sum(parts.values()),
        "mode": report.resolved["gradient_checkpointing"],
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "train_s": sum(step["num_pairs"] / step["pairs_per_s"] for step in steps),
        "num_pairs": sum(step["num_pairs"] for step in steps),
        "peak_bytes": report.peak_bytes,
        "shapes": shapes(pairs, arguments.batch_size),
    }
    arguments.out.write_text(json.dumps(found))


def floor(
    report: dpo_cache.TrainReport,
    pairs: list[ScoredPair],
    batch_size: int,
    process_bytes: int,
    lora_r: int | None,
) -> dict[str, int]:
    """The bytes that a step needs at least; activations are those of the largest forest, under the run's
    recomputation.
    """
    model = load_model(report.resolved["model"], dtype=torch.float32, device=torch.device("cpu"))
    if lora_r:
        add_adapter(model, lora_config(lora_r, None, "all-linear"), seed=0)
    attention = choose_attention(model, max_length=1024)
    Recomputation(model).mode = report.resolved["gradient_checkpointing"]
    steps = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    groups = [group for step in steps for group in split_step(step, report.resolved["budget_tokens"])]
    largest = max(groups, key=lambda group: group.num_tokens)
    weights, trained = 4 * report.num_parameters, 4 * report.num_trained
    for parameter in model.parameters():  # gradients of earlier forests exist, and are counted as gradients
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    passes = pass_bytes(model, completions_of(largest.pairs), attention)
    return {
        "process": process_bytes,
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": passes,
    }


def shapes(pairs: list[ScoredPair], batch_size: int) -> dict[str, int]:
    """The amount of work: distinct tokens of each step, pairs of a token with itself or an ancestor, and
    distinct answer tokens.
    """
    sums = {"tokens": 0, "ancestor_pairs": 0, "targets": 0}
    rest = iter(pairs)
    while step := list(islice(rest, batch_size)):
        forest = build_forest(
            [side for scored in step for side in (scored.pair.chosen, scored.pair.rejected)]
        )
        sums["tokens"] += len(forest)
        sums["ancestor_pairs"] += int((forest.depths_L + 1).sum())
        sums["targets"] += int(forest.is_target_L().sum())
    return sums


if __name__ == "__main__":
    main()
