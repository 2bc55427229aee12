"""Memory and speed of training with each option that saves memory: a few real steps, in fresh processes.

    memory_options.py --model MODEL --data FILE [--rows N] [--batch-size N] [--steps N] [--turns N]
    [--only WORD ...] [--bf16]

Prints a table in Markdown with pairs/s, peak memory (resident; on CUDA that of its allocator), the losses and
gradient norms of each configuration; of several turns, in which the configurations alternate, the medians.
The rows are scored once for each quantization of the base. On a CPU,
bfloat16 runs only with --bf16, because it is hundreds of times slower there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Options = dict[str, Any]

ONE_FOREST = {"budget_tokens": "100000"}  # one backward pass per step, so that gradients can be freed
FULL = {"gradient_checkpointing": "full"}
APPLIED = {"place": "gradients=none"}
LORA = {"lora_r": 16, "lr": 1e-4}

CONFIGURATIONS: dict[str, Options] = {
    "AdamW": {},
    "AdamW, recomputation none": {"gradient_checkpointing": "none"},
    "AdamW, recomputation cheap": {"gradient_checkpointing": "cheap"},
    "AdamW, recomputation selective": {"gradient_checkpointing": "selective"},
    "AdamW, recomputation full": FULL,
    "AdamW, layer by layer": {"place": "inputs=device"},
    "AdamW, layer by layer, gradients applied": APPLIED,
    "AdamW, 512 tokens at once": {"budget_tokens": "512"},
    "AdamW, one forest a step": ONE_FOREST,
    "bfloat16 state": {"optimizer": "adamw-bf16"},
    "8-bit AdamW": {"optimizer": "adamw-8bit"},
    "8-bit AdamW, layer by layer, gradients applied": {"optimizer": "adamw-8bit", **APPLIED},
    "Adafactor": {"optimizer": "adafactor"},
    "Adafactor, layer by layer, gradients applied": {"optimizer": "adafactor", **APPLIED},
    "LoRA": LORA,
    "LoRA, recomputation full": {**LORA, **FULL},
    "LoRA, layer by layer": {**LORA, "place": "inputs=device"},
    "LoRA, 8-bit base": {**LORA, "quantize": "8bit"},
    "LoRA, 4-bit base": {**LORA, "quantize": "4bit"},
    "LoRA, 4-bit base, layer by layer": {**LORA, "quantize": "4bit", "place": "inputs=device"},
    "bfloat16, stochastic": {"precision": "bf16", "rounding": "stochastic"},
    "bfloat16, compensated": {"precision": "bf16", "rounding": "compensated"},
    "memory small": {"memory": "small"},
    "memory least": {"memory": "least"},
    "LoRA, memory least": {**LORA, "memory": "least"},
    "bfloat16, 8-bit AdamW, memory small": {"precision": "bf16", "optimizer": "adamw-8bit", "memory": "small"},
    "bfloat16, 8-bit AdamW, memory least": {"precision": "bf16", "optimizer": "adamw-8bit", "memory": "least"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument(
        "--only", nargs="*", default=[], help="configurations whose name has one of these words"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return
    if not arguments.model or not arguments.data:
        parser.error("--model and --data are required")
    compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    chosen = {
        title: changes for title, changes in CONFIGURATIONS.items() if is_selected(title, changes, arguments)
    }
    found: dict[str, list[dict[str, Any]]] = {title: [] for title in chosen}
    with tempfile.TemporaryDirectory() as name:
        caches = {
            quantize: score(quantize, Path(name), arguments)
            for quantize in dict.fromkeys(changes.get("quantize", "none") for changes in chosen.values())
        }
        for _ in range(arguments.turns):
            for title, changes in chosen.items():
                cache = caches[changes.get("quantize", "none")]
                found[title].append(train(cache, Path(name), changes, arguments))
                print(row(title, found[title][-1]), file=sys.stderr, flush=True)
    print("| configuration | pairs/s | peak memory, GB | losses | gradient norms |\n|---|---|---|---|---|")
    for title, turns in found.items():
        print(row(title, median(turns)))


def score(quantize: str, folder: Path, arguments: argparse.Namespace) -> str:
    """A new cache of the rows, under the model in so many bits."""
    cache = str(folder / f"cache-{quantize}")
    source = {"model": arguments.model, "dataset": arguments.data, "limit": arguments.rows}
    in_child({"precompute": {**source, "quantize": quantize, "cache": cache, "name": "rows"}})
    return cache


def train(cache: str, folder: Path, changes: Options, arguments: argparse.Namespace) -> dict[str, Any]:
    shared = {
        "batch_size": arguments.batch_size,
        "max_steps": arguments.steps,
        "lr": 1e-5,
        "shuffle": False,
        "max_grad_norm": 0.0,
        "memory": "fast",
    }
    schedule = {"epochs": 1000.0, "lr_schedule": "constant", "warmup_ratio": 0.0}
    return in_child(
        {"train": {"cache": cache, "output": str(folder / "run"), **shared, **schedule, **changes}}
    )


def median(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The last turn, with the median speed and memory of all."""
    if "error" in turns[-1]:
        return turns[-1]
    done = [turn for turn in turns if "error" not in turn]
    speeds, peaks = ([turn[name] for turn in done] for name in ("pairs_per_s", "peak_bytes"))
    return {**turns[-1], "pairs_per_s": statistics.median(speeds), "peak_bytes": statistics.median(peaks)}


def is_selected(title: str, changes: Options, arguments: argparse.Namespace) -> bool:
    """Whether --only names the configuration; without --only, whether it is useful on this machine."""
    if arguments.only:
        return any(word in title for word in arguments.only)
    import torch

    on_gpu = torch.cuda.is_available()
    return (on_gpu or arguments.bf16 or changes.get("precision") != "bf16") and (
        on_gpu or "memory" not in changes
    )


def row(title: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {title} | {found['error']} | | | |"
    numbers = [" ".join(f"{value:.6g}" for value in found[name]) for name in ("losses", "grad_norms")]
    return (
        f"| {title} | {found['pairs_per_s']:.3f} | {found['peak_bytes'] / 1e9:.2f} | {numbers[0]} | "
        f"{numbers[1]} |"
    )


def in_child(task: dict[str, Options]) -> dict[str, Any]:
    """Run `run_child` in its own process, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        if "precompute" in task:
            sys.exit("\n".join(lines[-20:]))
        return {"error": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_child(task: dict[str, Options]) -> None:
    import dpo_cache

    if "precompute" in task:
        dpo_cache.precompute(**task["precompute"])
        print("{}")
        return
    steps: list[dict[str, Any]] = []
    options = task["train"]
    with tempfile.TemporaryDirectory(dir=Path(options["output"]).parent) as folder:
        report = dpo_cache.train(**{**options, "output": f"{folder}/run"}, on_metrics=steps.append)
    later = steps[1:] or steps  # the first step warms up
    found = {
        "pairs_per_s": sum(step["num_pairs"] for step in later)
        / sum(step["num_pairs"] / step["pairs_per_s"] for step in later),
        "peak_bytes": report.peak_bytes,
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
