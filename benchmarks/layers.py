"""Scoring layer by layer: speed and memory compared with a resident model, and a model larger than the memory.

    layers.py --model MODEL [--folder FOLDER] [--only small|1b|7b] [--turns N]

small  MODEL, at least 8,000 tokens: resident and streamed from disk in turns; log-probs to the bit
1b     the same for the shape of Llama 3.2 1B with random float32 weights
7b     the shape of Llama 2 7B, seeded random bfloat16 weights in safetensors (13 GB in FOLDER, removed
       afterwards), computed in float32 in a process of its own: two windows of 8 chunks, VmHWM and the bytes
       read; and its first 4 layers, resident and streamed

Both sides multiply by the library that is faster for the resident model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_cache.lm.device import peak_resident_bytes
from dpo_cache.lm.layerwise.check import find_layer_major
from dpo_cache.lm.model.load import load_config, load_model
from dpo_cache.lm.model.load_streamed import load_streamed
from dpo_cache.lm.prepare import prepared
from dpo_cache.lm.runner import Runner, open_runner, run_loaded
from dpo_cache.lm.streaming import choose_streaming
from dpo_cache.types import Completion

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPT, ANSWER = 96, 80  # tokens
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
CUT = 4  # layers
CHUNKS_PER_WINDOW = 8  # of the 7B


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", help="for the large models; default: a temporary one")
    parser.add_argument("--only", choices=("small", "1b", "7b"))
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk of the 7B; default: 128")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_large(arguments.run, arguments.chunk)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.only in (None, "small"):
            compare_speed("MODEL", arguments.model, arguments.tokens, arguments.turns)
        if arguments.only in (None, "1b"):
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SHAPES["1b"])).save_pretrained(folder / "1b")
            compare_speed("1B", str(folder / "1b"), arguments.tokens, arguments.turns)
            shutil.rmtree(folder / "1b")
        if arguments.only in (None, "7b"):
            score_large(folder / "7b", arguments.chunk)


def make_pairs(num_tokens: int, vocab_size: int) -> list[Completion]:
    """Two answers to each prompt, in a forest of so many tokens; the first token tells prompts apart."""
    generator, completions = np.random.default_rng(0), list[Completion]()
    for _ in range(num_tokens // (PROMPT + 2 * ANSWER)):
        prompt = generator.integers(0, vocab_size, PROMPT).astype(np.uint32)
        for _ in range(2):
            answer = generator.integers(0, vocab_size, ANSWER).astype(np.uint32)
            completions.append(Completion(prompt, answer))
    return completions


def score(runner: Runner, completions: list[Completion]) -> list[np.ndarray]:
    steps = runner.score(completions, rows_of=lambda index: [index])
    found = {index: scored.token_logps for step in steps for index, scored in step.scores}
    return [found[index] for index in range(len(completions))]


def compare_speed(name: str, location: str, num_tokens: int, turns: int) -> None:
    """Print the tokens a second of both ways, in turns."""
    completions = make_pairs(num_tokens, load_config(location).vocab_size)
    times: dict[str, list[float]] = {"resident": [], "streamed": []}
    cpu: dict[str, list[float]] = {
        "resident": [],
        "streamed": [],
    }  # of all threads: other work does not count
    with resident(location) as (whole, linear), streamed(location, linear) as layered:
        for _ in range(turns):
            found = {}
            for way, runner in (("resident", whole), ("streamed", layered)):
                started, cpu_started = time.perf_counter(), time.process_time()
                found[way] = score(runner, completions)
                times[way].append(time.perf_counter() - started)
                cpu[way].append(time.process_time() - cpu_started)
            is_equal = all(map(np.array_equal, found["resident"], found["streamed"]))
    print(f"{name}, {num_tokens:,} tokens in chunks of 512, linear layers by {linear}:")
    for kind, taken in (("seconds", times), ("seconds of CPUs", cpu)):
        shown = {way: ", ".join(f"{one:.1f}" for one in some) for way, some in taken.items()}
        ratio = min(taken["resident"]) / min(taken["streamed"])
        print(
            f"  {kind}: resident {shown['resident']}; streamed {shown['streamed']}: {ratio:.2f} of the speed"
        )
    print(f"  log-probs {'equal to the bit' if is_equal else 'DIFFER'}", flush=True)


@contextmanager
def resident(location: str, chunk: int = 512) -> Iterator[tuple[Runner, str]]:
    model = load_model(location, dtype=FP32, device=CPU)
    with (
        prepared(model) as how,
        run_loaded(model, name=location, max_length=256, budget_tokens=chunk, run_tokens=0) as runner,
    ):
        yield runner, how.linear


@contextmanager
def streamed(location: str, linear: str, chunk: int = 512) -> Iterator[Runner]:
    """All tokens are one window."""
    model, weights = load_streamed(location, dtype=FP32, device=CPU, weights="disk")
    with weights, prepared(model, linear=linear):
        layer_major = find_layer_major(model, weights, 2**34)
        layer_major.window_tokens = 2**30
        with run_loaded(
            model,
            name=location,
            max_length=256,
            budget_tokens=chunk,
            run_tokens=0,
            layer_major=layer_major,
        ) as runner:
            yield runner


def score_large(folder: Path, chunk: int) -> None:
    write_large(folder)
    cut_large(folder, folder / "cut")
    for name in (folder, folder / "cut"):
        command = [sys.executable, __file__, "--model", "-", "--run", str(name), "--chunk", str(chunk)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name.name}: {found}", flush=True)


def write_large(folder: Path) -> None:
    """Save seeded random bfloat16 weights, a file for each layer: no more than one is in memory."""
    folder.mkdir()
    config = LlamaConfig(**SHAPES["7b"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    for number, (file, some) in enumerate(files.items()):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape).normal_(0, 0.02, generator=generator).to(torch.bfloat16)
            for name, shape in some.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
    _write_index(folder, {name: file for file, some in files.items() for name in some})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def cut_large(folder: Path, cut: Path) -> None:
    """Links to the files of its first layers, and a config of so many."""
    cut.mkdir()
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = CUT
    config.save_pretrained(cut)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {"model-ends.safetensors", *(f"model-{layer}.safetensors" for layer in range(CUT))}
    for file in kept:
        (cut / file).symlink_to(folder.resolve() / file)
    _write_index(cut, {name: file for name, file in index.items() if file in kept})


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_large(location: str, chunk: int) -> dict[str, Any]:
    """What streaming the model took; of the cut, also whether its log-probs are those of a resident run."""
    config = load_config(location)
    completions = make_pairs(2 * CHUNKS_PER_WINDOW * chunk, config.vocab_size)
    streaming = choose_streaming("on", location, config, revision=None, dtype=FP32, device=CPU)
    assert streaming is not None
    options: dict[str, Any] = {
        "dtype": FP32,
        "device": CPU,
        "max_length": 256,
        "budget_tokens": chunk,
        "run_tokens": 0,
    }
    started, before = time.perf_counter(), peak_resident_bytes()
    with open_runner(location, streaming=streaming, **options) as runner:
        layer_major = runner.layer_major
        assert layer_major is not None
        layer_major.window_tokens = CHUNKS_PER_WINDOW * chunk
        checked_s, checked = time.perf_counter() - started, layer_major.readings
        found = score(runner, completions)
        result = {
            "layers": config.num_hidden_layers,
            "checkpoint GB": sum(path.stat().st_size for path in Path(location).glob("*.safetensors")) / 1e9,
            "tokens": 2 * CHUNKS_PER_WINDOW * chunk,
            "windows": layer_major.readings[1] - checked[1],
            "check s": round(checked_s, 1),
            "check readings": checked[1],
            "scoring s": round(time.perf_counter() - started - checked_s, 1),
            "longest wait for weights in a window, s": round(layer_major.meter.reading_s, 1),
            "GB read while scoring": (layer_major.readings[2] - checked[2]) / 1e9,
            "GB read in all": layer_major.readings[2] / 1e9,
            "VmHWM GB, of which imports": (peak_resident_bytes() / 1e9, before / 1e9),
        }
    if config.num_hidden_layers == CUT:
        with open_runner(location, **options) as runner:
            result["equal to a resident run"] = all(map(np.array_equal, found, score(runner, completions)))
    return result


if __name__ == "__main__":
    main()
