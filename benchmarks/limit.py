"""The limit of scoring: the time of the matrix products that every exact method needs.

    for every distinct token of the trie     the linear layers, and attention to its ancestors
    for every distinct answer token          the LM head

Each product counts at its speed on this machine at the time of the run, with the faster of torch's libraries:
the linear layers on a chunk of tokens, the attention products on blocks of 128 queries and a path of mean
length, the head on 256 tokens. Everything else (norms, activations, softmax, copies, planning) is left out,
so no program can reach 100 %.

    limit.py MODEL SHAPES.json OUT.json [--train] [--lora-r N]

--train gives the limit of training: the same products and those of their two gradients, each at the speed of
its kind; attention counts 3.5 times, because its gradients need five more products. --lora-r gives the limit
of training LoRA adapters on all linear layers but the head: no gradients of other weights, but the products
of the adapters.

SHAPES.json is the `shapes` of `our_side.py`. MODEL is a Llama-like model, of which only the config is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dpo_cache.lm.kernels.onednn_linear import ONEDNN, TORCH, Products

LIBRARIES: tuple[Products, ...] = (TORCH, ONEDNN)
CHUNK_TOKENS = 1024
QUERY_BLOCK = 128
HEAD_TOKENS = 256


# Products of a layer; a layer with frozen weights only passes gradients on.
SCORE, TRAIN, PASS_ON = (
    ("output",),
    ("output", "for_inputs", "for_weight"),
    ("output", "for_inputs"),
)


def main(
    model: str, shapes: dict[str, Any], *, train: bool = False, lora_r: int | None = None
) -> dict[str, float]:
    """Seconds of each part and in total, and the measured speeds."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    kinds = SCORE if not train else PASS_ON if lora_r else TRAIN
    linear = linear_seconds_per_token(config, kinds, lora_r)
    attention = attention_seconds_per_pair(config, max(1, round(shapes["ancestor_pairs"] / shapes["tokens"])))
    attention *= 3.5 if train else 1
    head = head_seconds_per_token(config, kinds)
    parts = {
        "linear_s": linear * shapes["tokens"],
        "attention_s": attention * shapes["ancestor_pairs"],
        "head_s": head * shapes["targets"],
    }
    return {
        "limit_s": sum(parts.values()),
        **parts,
        "linear_tokens_per_s": 1 / linear,
        "head_tokens_per_s": 1 / head,
    }


def linear_seconds_per_token(config: Any, kinds: Sequence[str], lora_r: int | None) -> float:
    """Seconds of all linear layers and their adapters per token, on `CHUNK_TOKENS` tokens at once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    sizes = [
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    # as many weights as the model, so that they do not stay in the processor's caches
    weights = [torch.randn(out, into) for _ in range(config.num_hidden_layers) for into, out in sizes]
    adapters = (
        [torch.randn(*shape) for into, out in sizes for shape in ((lora_r, into), (out, lora_r))]
        if lora_r
        else []
    )
    seconds = seconds_of_products(
        weights, CHUNK_TOKENS, kinds
    ) + config.num_hidden_layers * seconds_of_products(adapters, CHUNK_TOKENS, TRAIN)
    return seconds / CHUNK_TOKENS


def seconds_of_products(weights: list[torch.Tensor], num_tokens: int, kinds: Sequence[str]) -> float:
    """Seconds of these products of each weight for that many tokens, with the faster library for each kind."""
    inputs = {size: torch.randn(num_tokens, size) for weight in weights for size in weight.shape}

    def run(name: str, products: Products) -> None:
        for weight in weights:
            out, into = weight.shape
            if name == "output":
                products.output(inputs[into], weight)
            elif name == "for_inputs":
                products.for_inputs(inputs[out], weight)
            else:
                products.for_weight(inputs[out], inputs[into], weight)

    return sum(min(median_seconds(partial(run, kind, library)) for library in LIBRARIES) for kind in kinds)


def attention_seconds_per_pair(config: Any, path: int) -> float:
    """Seconds of both products of attention in all layers, per pair of a query and a key."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    query = torch.randn(config.num_key_value_heads, groups * QUERY_BLOCK, head_size)
    keys, values = (torch.randn(config.num_key_value_heads, path, head_size) for _ in range(2))

    def run() -> None:
        torch.bmm(torch.bmm(query, keys.transpose(1, 2)), values)

    return median_seconds(run, repeats=50) * config.num_hidden_layers / (QUERY_BLOCK * path)


def head_seconds_per_token(config: Any, kinds: Sequence[str]) -> float:
    """Seconds of the LM head per token, on `HEAD_TOKENS` tokens at once."""
    return (
        seconds_of_products([torch.randn(config.vocab_size, config.hidden_size)], HEAD_TOKENS, kinds)
        / HEAD_TOKENS
    )


def median_seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("shapes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--lora-r", type=int)
    arguments = parser.parse_args()
    with torch.no_grad():
        found = main(
            arguments.model,
            json.loads(arguments.shapes.read_text()),
            train=arguments.train,
            lora_r=arguments.lora_r,
        )
    arguments.out.write_text(json.dumps(found))
