"""One policy-only training run from a cache, for `train.py`: losses, gradient norms, seconds and memory.

our_training.py CACHE OUT.json --batch-size N [option=value ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import dpo_cache
from dpo_cache.lm.forest import build_forest
from dpo_cache.types import ScoredPair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    options: dict[str, Any] = dict(entry.split("=", 1) for entry in arguments.options)
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as output:
        report = dpo_cache.train(
            arguments.cache, f"{output}/run", device="cpu", precision="fp32", beta=0.1, lr=1e-5, lr_schedule="constant", warmup_ratio=0.0,
            weight_decay=0.0, max_grad_norm=1.0, shuffle=False, batch_size=arguments.batch_size, on_metrics=steps.append, **options,
        )  # fmt: skip
    found = {
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "train_s": sum(step["num_pairs"] / step["pairs_per_s"] for step in steps),
        "num_pairs": sum(step["num_pairs"] for step in steps),
        "peak_bytes": report.peak_bytes,
        "shapes": shapes(list(dpo_cache.open_cache(arguments.cache).pairs("rows")), arguments.batch_size),
    }
    arguments.out.write_text(json.dumps(found))


def shapes(pairs: list[ScoredPair], batch_size: int) -> dict[str, int]:
    """What must be multiplied: of each step's distinct tokens, their ancestors, and the distinct answer tokens."""
    sums = {"tokens": 0, "ancestor_pairs": 0, "targets": 0}
    rest = iter(pairs)
    while step := list(islice(rest, batch_size)):
        forest = build_forest([side for scored in step for side in (scored.pair.chosen, scored.pair.rejected)])
        sums["tokens"] += len(forest)
        sums["ancestor_pairs"] += int((forest.depths_L + 1).sum())
        sums["targets"] += int(forest.is_target_L().sum())
    return sums


if __name__ == "__main__":
    main()
