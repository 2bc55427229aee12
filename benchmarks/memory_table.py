"""The tables of docs/memory.md: GPU memory of a training step, of dpo-cache and of DPO with a live reference,
counted without a GPU.

    memory_table.py --model MODEL [--trl-python PYTHON] [--only validation|tables] [--models 1B 3B 8B]

validation  on MODEL, a small real one, in float32 on the CPU: the count from its config, compared with the
            memory of torch's allocator when the same passes are computed, and with TRL's own step
tables      Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, of which only the configs below are needed

`dpo_cache/planning/footprint.py` describes what is counted, `padded_step.py` is TRL's side.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.kernels.onednn_linear import use_fast_linear
from dpo_cache.planning.footprint import (
    Footprint,
    activation_bytes,
    build_fake,
    pass_loss,
    policy_of,
    standing_footprint,
)
from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.planning.padded_step import padded_loss, prepare
from dpo_cache.types import Completion

LLAMA: dict[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
CONFIGS = {
    "1B": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        tie_word_embeddings=True,
        **LLAMA,
    ),
    "3B": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        tie_word_embeddings=True,
        **LLAMA,
    ),
    "8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
        **LLAMA,
    ),
}


@dataclass(frozen=True)
class Batch:
    """Number of pairs that run at once, and their lengths in tokens."""

    prompt: int
    answer: int
    pairs: int

    def completions(self) -> list[Completion]:
        generator = np.random.default_rng(0)
        prompts = [generator.integers(0, 40_000, self.prompt).astype(np.uint32) for _ in range(self.pairs)]
        return [
            Completion(prompt, generator.integers(0, 40_000, self.answer).astype(np.uint32))
            for prompt in prompts
            for _ in range(2)
        ]


USUAL, LONG = Batch(512, 256, 4), Batch(2048, 1024, 1)
VALIDATION = Batch(400, 150, 1)


@dataclass(frozen=True)
class Setup:
    """A way to fine-tune. `dtype` is that of the weights; adapters have float32 weights and, under autocast,
    bfloat16 products.
    """

    name: str
    dtype: torch.dtype
    precision: str
    optimizer: str = "adamw"
    lora_r: int | None = None
    quantize: str | None = None


SETUPS = (
    Setup("full, AdamW, bf16-mixed", torch.float32, "bf16-mixed"),
    Setup("full, AdamW, bf16", torch.bfloat16, "bf16"),
    Setup("full, 8-bit AdamW, bf16", torch.bfloat16, "bf16", "adamw-8bit"),
    Setup("LoRA r=16 on bf16", torch.bfloat16, "bf16-mixed", lora_r=16),
    Setup("LoRA r=16 on 4-bit", torch.bfloat16, "bf16-mixed", lora_r=16, quantize="4bit"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--trl-python", help="interpreter of an environment with trl==1.16.0")
    parser.add_argument("--only", choices=("validation", "tables"))
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    arguments = parser.parse_args()
    if arguments.only != "tables":
        validate(arguments.model, arguments.trl_python)
    if arguments.only != "validation":
        show_tables(arguments.models)


# -- validation ----------------------------------------------------------------------------------------


def validate(location: str, trl_python: str | None) -> None:
    """Compare counted with allocated memory for one pair, while gradients of earlier pairs exist."""
    config = AutoConfig.from_pretrained(location)
    pair = VALIDATION.completions()
    theirs_allocated = trl_bytes(location, trl_python) if trl_python else {}
    print("| what is run | counted, MB | allocated, MB | counted / allocated |\n|---|---|---|---|")
    for mode in ("none", "cheap", "selective", "full"):
        ours = partial(policy_of, mode=mode)
        compare(f"dpo-cache, {mode}", location, config, ours, lambda _: pass_loss(pair))
        compare(
            f"dpo-cache, {mode}, linear layers by oneDNN",
            location,
            config,
            ours,
            lambda _: pass_loss(pair),
            fast=True,
        )
    for checkpointing in (False, True):
        theirs = partial(prepare, checkpointing=checkpointing)
        for whole in (False, True):
            name = (
                f"padded rows, {'whole logits' if whole else 'tiled head'}, checkpointing "
                f"{'on' if checkpointing else 'off'}"
            )
            counted = compare(name, location, config, theirs, partial(with_reference, pair, whole=whole))
            if not whole and theirs_allocated:
                allocated = theirs_allocated["on" if checkpointing else "off"]
                show_comparison(
                    f"the same by TRL 1.16 itself, checkpointing {'on' if checkpointing else 'off'}",
                    counted,
                    allocated,
                )


def trl_bytes(location: str, python: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        out, here = Path(folder, "out.json"), Path(__file__)
        paths = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [python, str(here.with_name("trl_memory.py")), location, str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        if done.returncode:
            sys.exit(f"trl_memory.py failed:\n{done.stderr[-4000:]}")
        return json.loads(out.read_text())


def with_reference(
    pair: list[Completion], make: Callable[[], Any], whole: bool
) -> Callable[[Any], torch.Tensor]:
    return padded_loss(pair, autocast=False, reference=make(), whole_logits=whole)


def compare(
    name: str,
    location: str,
    config: Any,
    ready: Callable[[Any], Any],
    loss: Callable[..., Any],
    *,
    fast: bool = False,
) -> int:
    """Print counted and allocated bytes, and return the counted ones."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32).eval()

    with FakeTensorMode(allow_non_fake_inputs=True):
        make = partial(build_fake, config, torch.float32)
        counted = activation_bytes(ready(make()), loss(make))
    model = load()
    if fast and use_fast_linear(model, decided="onednn") != "onednn":
        print(f"| {name} | | not on this processor | |", flush=True)
        return counted
    run, model = loss(load), ready(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    show_comparison(name, counted, allocated_peak(lambda: run(model).backward()))
    return counted


def show_comparison(name: str, counted: int, allocated: int) -> None:
    print(
        f"| {name} | {counted / 1e6:,.1f} | {allocated / 1e6:,.1f} | {counted / allocated:.3f} |", flush=True
    )


# -- tables --------------------------------------------------------------------------------------------


def show_tables(models: list[str]) -> None:
    for size in models:
        show(size, USUAL, ("none", "cheap", "selective", "full"))
        show_parts(size, USUAL)
    show(models[-1], LONG, ("full",))
    show_sizes(models[-1])


def show(size: str, batch: Batch, modes: tuple[str, ...]) -> None:
    """Print GB of dpo-cache, of TRL 1.16, and of whole logits, for every setup."""
    print(
        "\n"
        f"Llama {size}, {batch.pairs} pairs at once, prompt {batch.prompt:,}, answers "
        f"{batch.answer:,} each, GB\n"
    )
    print(
        "| | recomputation | dpo-cache | TRL 1.16 | share | whole logits | share |\n"
        "|---|---|---|---|---|---|---|"
    )
    for setup in SETUPS:
        for mode in modes:
            ours = footprint(size, batch, setup, mode).total
            theirs = footprint(size, batch, setup, peer(mode), "tiled").total
            line = f"| {setup.name} | {mode} | {ours / 1e9:.1f} | {theirs / 1e9:.1f} | {ours / theirs:.2f} |"
            if mode == "full":
                whole = footprint(size, batch, setup, mode, "whole").total
                line += f" {whole / 1e9:.1f} | {ours / whole:.2f} |"
            print(line if mode == "full" else f"{line} | |", flush=True)


def show_parts(size: str, batch: Batch) -> None:
    print(f"\nLlama {size}, the same, by use, recomputation full, GB\n")
    print("| | | weights | gradients | optimizer | activations | total |\n|---|---|---|---|---|---|---|")
    for setup in SETUPS:
        for name, side in (("dpo-cache", "ours"), ("TRL 1.16", "tiled")):
            found = footprint(size, batch, setup, "full", side)
            parts = (found.weights, found.gradients, found.optimizer, found.activations, found.total)
            print(f"| {setup.name} | {name} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |")


def show_sizes(size: str) -> None:
    print(f"\nLlama {size}, pairs at once, of prompt 512 and answers 256 each, recomputation full, GB\n")
    print("| | pairs at once | dpo-cache | TRL 1.16 | share |\n|---|---|---|---|---|")
    for setup in (SETUPS[1], SETUPS[3], SETUPS[4]):
        for pairs in (1, 4, 8):
            ours, theirs = (
                footprint(size, Batch(512, 256, pairs), setup, "full", side).total
                for side in ("ours", "tiled")
            )
            print(
                f"| {setup.name} | {pairs} | {ours / 1e9:.1f} | {theirs / 1e9:.1f} | {ours / theirs:.2f} |",
                flush=True,
            )


def peer(mode: str) -> str:
    """The mode of TRL to compare with: checkpointing of whole layers, or none."""
    return "full" if mode == "full" else "none"


@cache
def footprint(size: str, batch: Batch, setup: Setup, mode: str, side: str = "ours") -> Footprint:
    activations = activations_of(size, batch, setup.dtype, setup.precision, setup.lora_r, mode, side)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_fake(CONFIGS[size], setup.dtype, lora_r=setup.lora_r)
        others = [build_fake(CONFIGS[size], setup.dtype)] if side != "ours" and setup.lora_r is None else []
        return standing_footprint(
            model,
            activations,
            optimizer=setup.optimizer,
            rounding="auto" if side == "ours" else None,
            quantize=setup.quantize,
            others=others,
        )


@cache
def activations_of(
    size: str, batch: Batch, dtype: torch.dtype, precision: str, lora_r: int | None, mode: str, side: str
) -> int:
    """Bytes of activations: dpo-cache's are counted on 2, 3 and 4 layers and extrapolated if they grow
    linearly; otherwise, and for TRL, all layers are counted.

    The live memory at a moment in layer k of n depends on n only through the activations that the layers
    below k keep. So the peak is the larger one of a constant, for moments in the first layer, and a linear
    function of n, for moments in the last; once the linear function is larger, it remains so. A live
    reference adds more such functions.
    """
    num_layers = CONFIGS[size].num_hidden_layers
    if side == "ours":
        few = [count(size, layers, batch, dtype, precision, lora_r, mode, side) for layers in (2, 3, 4)]
        step = few[2] - few[1]
        if step > 0 and step == few[1] - few[0]:
            return few[2] + step * (num_layers - 4)
    return count(size, num_layers, batch, dtype, precision, lora_r, mode, side)


def count(
    size: str,
    layers: int,
    batch: Batch,
    dtype: torch.dtype,
    precision: str,
    lora_r: int | None,
    mode: str,
    side: str,
) -> int:
    """Bytes of activations of the model with that number of layers."""
    config = copy.deepcopy(CONFIGS[size])
    config.num_hidden_layers = layers
    with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type("cuda"):
        model = build_fake(config, dtype, lora_r=lora_r)
        if side == "ours":
            return activation_bytes(
                policy_of(model, mode), pass_loss(batch.completions(), precision=precision)
            )
        reference = build_fake(config, dtype) if lora_r is None else None
        loss = padded_loss(
            batch.completions(),
            autocast=True,
            reference=reference,
            with_adapters=lora_r is not None,
            whole_logits=side == "whole",
        )
        return activation_bytes(prepare(model, checkpointing=mode == "full"), loss)


if __name__ == "__main__":
    main()
