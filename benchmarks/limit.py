"""The limit of scoring: the time of the matrix products that no exact method can leave out.

    for every distinct token of the trie     the linear layers, and attention to its own ancestors
    for every answer token that is distinct  the LM head

each at the speed that this machine reaches for it here and now, by the faster of torch's libraries: the linear layers on a
chunk of tokens, the attention products on blocks of 128 queries against the mean path, the head on 256 tokens.
Everything else (norms, activations, softmax, copies, planning) is left out, so 100 % cannot be reached.

    limit.py MODEL SHAPES.json OUT.json [--train]

With --train, of training: the same products and those of their two gradients, each at the speed of its own kind; of
attention, whose gradients are five products more, two and a half times as much again.

SHAPES.json is what `our_side.py` wrote of the data. Written for Llama-like models; MODEL is read for its weights' shapes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from dpo_cache.lm.linear import ONEDNN, TORCH, Products

LIBRARIES: tuple[Products, ...] = (TORCH, ONEDNN)
CHUNK_TOKENS = 1024
QUERY_BLOCK = 128
HEAD_TOKENS = 256


def main(model: str, shapes: dict[str, Any], *, train: bool = False) -> dict[str, float]:
    """Seconds of each part and in all, and the speeds they follow from."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    linear = linear_seconds_per_token(config, train)
    attention = attention_seconds_per_pair(config, max(1, round(shapes["ancestor_pairs"] / shapes["tokens"])))
    attention *= 3.5 if train else 1
    head = head_seconds_per_token(config, train)
    parts = {
        "linear_s": linear * shapes["tokens"],
        "attention_s": attention * shapes["ancestor_pairs"],
        "head_s": head * shapes["targets"],
    }
    return {"limit_s": sum(parts.values()), **parts, "linear_tokens_per_s": 1 / linear, "head_tokens_per_s": 1 / head}


def linear_seconds_per_token(config: Any, train: bool) -> float:
    """All linear layers of the decoder, on `CHUNK_TOKENS` tokens at once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    # as many weights as the model: caches as cold
    weights = [torch.randn(out, into) for _ in range(config.num_hidden_layers) for into, out in sizes]
    return seconds_of_products(weights, CHUNK_TOKENS, train) / CHUNK_TOKENS


def seconds_of_products(weights: list[torch.Tensor], num_tokens: int, train: bool) -> float:
    """One product of each weight with that many tokens, or, to train, three, by whichever library is faster for each kind."""
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

    kinds = ("output", "for_inputs", "for_weight") if train else ("output",)
    return sum(min(median_seconds(partial(run, kind, library)) for library in LIBRARIES) for kind in kinds)


def attention_seconds_per_pair(config: Any, path: int) -> float:
    """Both products of attention, all layers, per pair of a query and a key."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    query = torch.randn(config.num_key_value_heads, groups * QUERY_BLOCK, head_size)
    keys, values = (torch.randn(config.num_key_value_heads, path, head_size) for _ in range(2))

    def run() -> None:
        torch.bmm(torch.bmm(query, keys.transpose(1, 2)), values)

    return median_seconds(run, repeats=50) * config.num_hidden_layers / (QUERY_BLOCK * path)


def head_seconds_per_token(config: Any, train: bool) -> float:
    """The LM head on `HEAD_TOKENS` tokens."""
    return seconds_of_products([torch.randn(config.vocab_size, config.hidden_size)], HEAD_TOKENS, train) / HEAD_TOKENS


def median_seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    with torch.no_grad():
        found = main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), train="--train" in sys.argv)
    Path(sys.argv[3]).write_text(json.dumps(found))
