"""dpo-cache's side of `precompute.py` and `memory.py`, in its own process.

    our_side.py MODEL ROWS.jsonl OUT.json [--max-length N] [--budget-tokens N] [--window N]

OUT.json has the reports of a first run and of a second one over the same cache, the sums of every row in
order, and the amount of work: distinct tokens, pairs of a token with itself or one of its ancestors, distinct
answer tokens, and the longest sequence.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import dpo_cache
from dpo_cache.lm.forest.stream import Stream


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--budget-tokens", default="auto")
    parser.add_argument("--window", type=int, default=16384)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        reports = []
        for _ in range(2):
            reports.append(
                dpo_cache.precompute(
                    arguments.model, arguments.rows, cache, name="rows", dtype="float32", device="cpu",
                    max_length=arguments.max_length, budget_tokens=arguments.budget_tokens, window=arguments.window,
                )
            )  # fmt: skip
            gc.collect()  # otherwise Python would collect the first run's garbage during the second
        first, second = reports
        pairs = list(dpo_cache.open_cache(cache).pairs("rows"))
    sums = [(scored.pair.row, scored.ref_chosen.logps, scored.ref_rejected.logps) for scored in pairs]
    shapes = work(Stream([side for scored in pairs for side in (scored.pair.chosen, scored.pair.rejected)]))
    arguments.out.write_text(
        json.dumps({"first": asdict(first), "second": asdict(second), "sums": sums, "shapes": shapes})
    )


def work(stream: Stream) -> dict[str, Any]:
    """The amount of work that every exact method needs."""
    ancestor_pairs = num_targets = 0
    for chunk in stream.chunks(lambda: 8192):
        ancestor_pairs += int((chunk.depths_C + 1).sum())
        num_targets += len(chunk.targets_T)
    return {
        "tokens": len(stream),
        "ancestor_pairs": ancestor_pairs,
        "targets": num_targets,
        "longest": int(np.max(stream.lengths)),
    }


if __name__ == "__main__":
    main()
