"""Speed and memory of training, compared with TRL 1.16 and with the machine's limit.

    train.py --model MODEL --data FILE [--rows N] [--trl-python PYTHON] [--repeats 3] [--batch-size 4]
             [--max-length 1024] [--live-only] [--lora-r N] [option=value ...]

Three programs train one epoch on the same rows in the same order, full fine-tuning with AdamW in float32 on
the CPU: dpo-cache from a cache, TRL with a live reference, and TRL with `precompute_ref_log_probs=True`. They
run alternately, each time in a fresh process. pairs/s do not include loading, tokenizing and scoring the
reference. `--live-only` leaves out the third program, to compare many steps. `--lora-r` trains a LoRA adapter
on all linear layers instead, with the same random initialization on all sides. `option=value` are options of
`dpo_cache.train`. Without `--trl-python`, only dpo-cache and the limit are measured.

The floor of memory is the least that a run needs under the chosen recomputation: the process with its
imports, weights, gradients, optimizer state, and the activations of the largest forest, counted by
`dpo_cache/planning/footprint.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import run, show, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--trl-python", help="default: only the limit is compared")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--live-only", action="store_true")
    parser.add_argument("--lora-r", type=int)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    peers: dict[str, list[str]] = {}
    if arguments.trl_python:
        peers["TRL, live reference"] = []
        if not arguments.live_only:
            peers["TRL, own precompute"] = ["--precompute"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_rows = write_rows(arguments.data, arguments.rows, folder / "rows.jsonl")
        print(
            f"{Path(arguments.data).name}: {num_rows} rows, batches of {arguments.batch_size}, "
            f"{arguments.repeats} alternating runs of each side"
        )
        precompute(arguments.model, folder, arguments.max_length)
        adapter = ["--lora-r", str(arguments.lora_r)] if arguments.lora_r else []
        batch = ["--batch-size", str(arguments.batch_size), *adapter]
        theirs = [arguments.model, str(folder / "rows.jsonl")]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ("dpo-cache", *peers)}
        limits = []
        for _ in range(arguments.repeats):
            ours = run(
                sys.executable,
                "our_training.py",
                [str(folder / "cache")],
                folder / "ours.json",
                [*batch, *arguments.options],
            )
            runs["dpo-cache"].append(ours)
            (folder / "shapes.json").write_text(json.dumps(ours["shapes"]))
            limit = run(
                sys.executable,
                "limit.py",
                [arguments.model, str(folder / "shapes.json")],
                folder / "limit.json",
                ["--train", *adapter],
            )
            limits.append(limit["limit_s"])
            length = [*batch, "--max-length", str(arguments.max_length)]
            for name, more in peers.items():
                runs[name].append(
                    run(
                        arguments.trl_python,
                        "trl_side.py",
                        ["train", *theirs],
                        folder / "trl.json",
                        [*length, *more],
                    )
                )
            print(
                "  "
                + "  ".join(
                    f"{name} {found[-1]['num_pairs'] / found[-1]['train_s']:.3f} pairs/s"
                    for name, found in runs.items()
                ),
                flush=True,
            )
    report(runs, limits)


def precompute(model: str, folder: Path, max_length: int) -> None:
    where = f"{model!r}, {str(folder / 'rows.jsonl')!r}, {str(folder / 'cache')!r}"
    command = (
        f"import dpo_cache; dpo_cache.precompute({where}, name='rows', dtype='float32', "
        f"device='cpu', max_length={max_length})"
    )
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)


def report(runs: dict[str, list[dict[str, Any]]], limits: list[float]) -> None:
    speeds = {name: [one["num_pairs"] / one["train_s"] for one in found] for name, found in runs.items()}
    ours = runs["dpo-cache"]
    for name in runs:
        show(f"pairs/s, {name}", speeds[name], "{:.3f}")
    for name in list(runs)[1:]:
        show(
            f"times as fast as {name}",
            [one / other for one, other in zip(speeds["dpo-cache"], speeds[name], strict=True)],
            "{:.2f}",
        )
    show(
        "share of the limit",
        [limit / one["train_s"] for one, limit in zip(ours, limits, strict=True)],
        "{:.1%}",
    )
    for name in list(runs)[1:]:
        show(
            f"the limit in times of {name}",
            [other["train_s"] / limit for other, limit in zip(runs[name], limits, strict=True)],
            "{:.2f}",
        )
    for name, found in runs.items():
        show(f"peak memory, {name}, GB", [one["peak_bytes"] / 1e9 for one in found], "{:.2f}")
    show("floor of memory, GB", [one["floor_bytes"] / 1e9 for one in ours], "{:.2f}")
    show("above the floor", [one["peak_bytes"] / one["floor_bytes"] - 1 for one in ours], "{:.1%}")
    print(
        f"    {', '.join(f'{name} {value / 1e9:.2f}' for name, value in ours[0]['floor'].items())}; "
        f"{ours[0]['mode']} recomputation"
    )
    for name in list(runs)[1:]:
        show(
            f"share of the memory of {name}",
            [one["peak_bytes"] / other["peak_bytes"] for one, other in zip(ours, runs[name], strict=True)],
            "{:.3f}",
        )
    live = runs.get("TRL, live reference")
    for entry in ("losses", "grad_norms") if live else ():
        pairs = list(zip(ours[0][entry], live[0][entry], strict=True))
        gap = max(abs(one - other) / abs(other) for one, other in pairs)
        print(
            f"  {entry}, largest relative difference from TRL with a live reference over {len(pairs)} "
            f"steps: {gap:.2e}"
        )
        print(
            f"    dpo-cache {', '.join(f'{one:.6f}' for one, _ in pairs[:4])}; TRL "
            f"{', '.join(f'{other:.6f}' for _, other in pairs[:4])}"
        )


if __name__ == "__main__":
    main()
