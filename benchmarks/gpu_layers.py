"""Layer-major scoring and training of an 8B model on a real GPU: peaks, seconds a step, and the plan's prediction.

    gpu_layers.py [--folder FOLDER] [--layers N] [--pairs N] [--steps N] [--tiny]

Makes a checkpoint of the shape of Llama 3.1 8B with random bf16 weights (16 GB in FOLDER, removed afterwards) and
pairs of 512 + 2 x 256 random letters, which are as many tokens. Each line is a process of its own:

precompute, resident and streamed     the same log-probs?
train, LoRA r=16, memory least        the base's weights pass the device layer by layer
train, full, AdamW, memory small      needs about 110 GB of host memory; --optimizer adamw-8bit half of it

--tiny runs all of it on a model of two small layers, on a CPU as well.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 128256}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "vocab_size": 300}
PROMPT, ANSWER = 512, 256  # tokens
LORA = {"lora_r": 16, "memory": "least"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run_child(json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        compare(Path(name), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    layers = 2 if arguments.tiny else arguments.layers
    make_checkpoint(folder / "model", {**(TINY if arguments.tiny else LARGE), "num_hidden_layers": layers})
    make_pairs(folder / "pairs.jsonl", arguments.pairs)
    print(f"checkpoint and pairs: {time.perf_counter() - started:.0f} s", flush=True)
    dtype = "float32" if arguments.tiny else "bfloat16"
    score = {"model": str(folder / "model"), "dataset": str(folder / "pairs.jsonl"), "dtype": dtype}
    for streams in ("off", "on"):
        options = {**score, "cache": str(folder / f"cache-{streams}"), "stream_weights": streams}
        show(f"precompute --stream-weights {streams}", in_child({"precompute": options}))
    same = in_child({"compare": [str(folder / "cache-off"), str(folder / "cache-on")]})
    print(f"largest difference of a log-prob: {same['gap']:.2g} nats", flush=True)
    train = {
        "cache": str(folder / "cache-off"),
        "max_steps": arguments.steps,
        "epochs": 1000.0,
        "batch_size": arguments.pairs,
        "precision": "fp32" if arguments.tiny else "bf16",
        "step_zero": "warn",
        "dry_run": True,
    }
    for name, changes in (
        ("train LoRA r=16 --memory least", LORA),
        ("train full --memory small", {"memory": "small", "optimizer": arguments.optimizer}),
        (
            "train full, weights on the host too",
            {
                "place": "weights=host,gradients=host,optimizer=host,inputs=host",
                "optimizer": arguments.optimizer,
            },
        ),
    ):
        show(name, in_child({"train": {**train, **changes, "output": str(folder / "run")}}))


def make_checkpoint(folder: Path, shape: dict[str, Any]) -> None:
    """Random bf16 weights, a shard for each layer, and a tokenizer whose tokens are bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir()
    config = LlamaConfig(
        **shape,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in state:
        place = name.split("layers.")[1].split(".")[0] if "layers." in name else "ends"
        shards.setdefault(f"model-{place}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            values = torch.ones(state[name].shape, device=device)
            if state[name].ndim > 1:
                values.normal_(0, 0.02, generator=generator)
            tensors[name] = values.to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, {"format": "pt"})
    index = {name: file for file, names in shards.items() for name in names}
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>").save_pretrained(folder)


def make_pairs(path: Path, count: int) -> None:
    generator = random.Random(0)

    def text(length: int) -> str:
        return "".join(generator.choices(string.ascii_letters, k=length))

    rows = [
        {"prompt": text(PROMPT), "chosen": text(ANSWER - 1), "rejected": text(ANSWER - 1)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def show(name: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{name}: {found['error']}", flush=True)
        return
    step = f", {found['step_s']:.2f} s a step" if "step_s" in found else ""
    print(
        f"{name}: {found['device_bytes'] / 1e9:.2f} GB on the device, {found['host_bytes'] / 1e9:.1f} GB resident "
        f"on the host, {found['seconds']:.0f} s in all{step}",
        flush=True,
    )


def in_child(task: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)], capture_output=True, text=True
    )
    if done.returncode:
        return {"error": " | ".join(done.stderr.strip().splitlines()[-3:])}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_child(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    import dpo_cache
    from dpo_cache.lm.device import peak_resident_bytes

    started, steps = time.perf_counter(), list[dict[str, Any]]()
    if "compare" in task:
        return {"gap": largest_gap(*task["compare"])}
    if "precompute" in task:
        dpo_cache.precompute(**task["precompute"], log=lambda text: print(text, file=sys.stderr))
    else:
        dpo_cache.train(
            **task["train"], on_metrics=steps.append, log=lambda text: print(text, file=sys.stderr)
        )
    is_cuda = torch.cuda.is_available()
    found = {
        "device_bytes": torch.cuda.max_memory_allocated() if is_cuda else 0,
        "host_bytes": peak_resident_bytes(),
        "seconds": time.perf_counter() - started,
    }
    return found | ({"step_s": steps[-1]["num_pairs"] / steps[-1]["pairs_per_s"]} if steps else {})


def largest_gap(one: str, other: str) -> float:
    import dpo_cache

    pairs = [dpo_cache.open_cache(cache).pairs("pairs") for cache in (one, other)]
    return max(
        float(abs(getattr(a, side).token_logps - getattr(b, side).token_logps).max())
        for a, b in zip(*(iter(entry) for entry in pairs), strict=True)
        for side in ("ref_chosen", "ref_rejected")
    )


if __name__ == "__main__":
    main()
