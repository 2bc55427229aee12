"""Memory and speed of training with each option that saves memory: a few real steps, in fresh processes.

    memory_options.py --model MODEL --data FILE [--rows N] [--batch-size N] [--steps N] [--only WORD ...]
    [--bf16]

Prints a table in Markdown with pairs/s, peak memory (resident; on CUDA that of its allocator), the losses and
gradient norms of each configuration. The rows are scored once for each quantization of the base. On a CPU,
bfloat16 runs only with --bf16, because it is hundreds of times slower there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Options = dict[str, Any]

ONE_FOREST = {"budget_tokens": "100000"}  # one backward pass per step, so that gradients can be freed
FREED = {"free_gradients": True}
LORA = {"lora_r": 16, "lr": 1e-4}

CONFIGURATIONS: dict[str, Options] = {
    "AdamW": {},
    "AdamW, recomputation none": {"gradient_checkpointing": "none"},
    "AdamW, recomputation cheap": {"gradient_checkpointing": "cheap"},
    "AdamW, recomputation selective": {"gradient_checkpointing": "selective"},
    "AdamW, recomputation full": {"gradient_checkpointing": "full"},
    "AdamW, 512 tokens at once": {"budget_tokens": "512"},
    "AdamW, one forest a step": ONE_FOREST,
    "AdamW, one forest a step, gradients freed": {**ONE_FOREST, **FREED},
    "8-bit AdamW": {"optimizer": "adamw-8bit"},
    "8-bit AdamW, gradients freed, recomputation full": {"optimizer": "adamw-8bit", "gradient_checkpointing": "full", **ONE_FOREST, **FREED},
    "Adafactor": {"optimizer": "adafactor"},
    "Adafactor, gradients freed, recomputation full": {"optimizer": "adafactor", "gradient_checkpointing": "full", **ONE_FOREST, **FREED},
    "LoRA": LORA,
    "LoRA, 8-bit base": {**LORA, "quantize": "8bit"},
    "LoRA, 4-bit base": {**LORA, "quantize": "4bit"},
    "LoRA, 4-bit base, recomputation full": {**LORA, "quantize": "4bit", "gradient_checkpointing": "full"},
    "bfloat16, stochastic": {"precision": "bf16", "rounding": "stochastic"},
    "bfloat16, compensated": {"precision": "bf16", "rounding": "compensated"},
    "bfloat16, stochastic, 8-bit AdamW, gradients freed": {
        "precision": "bf16", "rounding": "stochastic", "optimizer": "adamw-8bit", **ONE_FOREST, **FREED
    },
    "activations offloaded": {"offload_activations": True, "gradient_checkpointing": "none"},
    "activations offloaded, recomputation full": {"offload_activations": True, "gradient_checkpointing": "full"},
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
    print(
        "| configuration | pairs/s | peak memory, GB | losses | gradient norms |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        scored: set[str] = set()
        for title, changes in CONFIGURATIONS.items():
            if not is_selected(title, changes, arguments):
                continue
            quantize = changes.get("quantize", "none")
            cache = str(Path(name, f"cache-{quantize}"))
            if quantize not in scored:
                source = {
                    "model": arguments.model,
                    "dataset": arguments.data,
                    "limit": arguments.rows,
                    "quantize": quantize,
                }
                in_child({"precompute": {**source, "cache": cache, "name": "rows"}})
                scored.add(quantize)
            shared = {
                "batch_size": arguments.batch_size,
                "max_steps": arguments.steps,
                "lr": 1e-5,
                "shuffle": False,
                "max_grad_norm": 0.0,
            }
            schedule = {"epochs": 1000.0, "lr_schedule": "constant", "warmup_ratio": 0.0}
            found = in_child(
                {"train": {"cache": cache, "output": str(Path(name, "run")), **shared, **schedule, **changes}}
            )
            print(row(title, found), flush=True)


def is_selected(title: str, changes: Options, arguments: argparse.Namespace) -> bool:
    """Whether --only names the configuration; without --only, whether it is useful on this machine."""
    if arguments.only:
        return any(word in title for word in arguments.only)
    import torch

    on_gpu = torch.cuda.is_available()
    return (on_gpu or arguments.bf16 or changes.get("precision") != "bf16") and (
        on_gpu or not changes.get("offload_activations")
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
