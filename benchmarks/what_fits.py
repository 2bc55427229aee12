"""The first table of docs/memory.md: which models train on which card, by `dpo-cache plan`.

    what_fits.py [--models 1B 3B 8B 70B] [--ram 256GiB]

A row is a model and a way to train it: for each card the fastest preset that fits, with the memory that it needs;
last, what DPO with a live reference needs, as TRL 1.16 runs it. Nothing is loaded and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import dpo_cache

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
TIED = ("1B", "3B")
SHARED = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
CARDS = ("8GiB", "12GiB", "16GiB", "24GiB", "48GiB", "80GiB")
WAYS: dict[str, dict[str, Any]] = {
    "full, bf16, AdamW": {"precision": "bf16"},
    "full, bf16-mixed, AdamW": {"precision": "bf16-mixed"},
    "LoRA r=16": {"precision": "bf16", "lora_r": 16, "quantize": "none"},
    "LoRA r=16 on 4 bits": {"precision": "bf16", "lora_r": 16, "quantize": "4bit"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--ram", default="256GiB")
    arguments = parser.parse_args()
    print(f"| model | way | {' | '.join(CARDS)} | live reference |\n|---|---|{'---|' * (len(CARDS) + 1)}")
    for size in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            write_config(Path(folder), size)
            for name, options in WAYS.items():
                print(row(size, name, folder, {**options, "ram": arguments.ram}), flush=True)


def write_config(folder: Path, size: str) -> None:
    """Write the config of a Llama of this size: all that `plan` reads of a model."""
    config = {**SHARED, **SHAPES[size], "tie_word_embeddings": size in TIED}
    (folder / "config.json").write_text(json.dumps(config))


def row(size: str, name: str, folder: str, options: dict[str, Any]) -> str:
    """The line of a model and a way to train it."""
    is_full = "lora_r" not in options
    report = dpo_cache.plan(folder, tflops=400.0, log=lambda _: None, **options)
    ways = [way for way in report.train if (way.method == "full") == is_full]
    cells = []
    for card in CARDS:
        best = next((way for way in ways if card in way.fits), None)
        cells.append("-" if best is None else f"{best.memory} {best.device_bytes / 1e9:.1f}")
    live = ways[0].live_reference_bytes
    return f"| {size} | {name} | {' | '.join(cells)} | {'?' if live is None else f'{live / 1e9:.1f}'} |"


if __name__ == "__main__":
    main()
