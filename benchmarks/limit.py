"""The limit of scoring: the time of the matrix products that no exact method can leave out.

    for every distinct token of the trie     the linear layers, and attention to its own ancestors
    for every answer token that is distinct  the LM head

each at the speed that this machine reaches for it here and now, by the faster of torch's libraries: the linear layers on a
chunk of tokens, the attention products on blocks of 128 queries against the mean path, the head on 256 tokens.
Everything else (norms, activations, softmax, copies, planning) is left out, so 100 % cannot be reached.

    limit.py MODEL SHAPES.json OUT.json

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

from dpo_cache.lm.linear import onednn_linear

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LIBRARIES: tuple[Linear, ...] = (torch.nn.functional.linear, onednn_linear)
CHUNK_TOKENS = 1024
QUERY_BLOCK = 128
HEAD_TOKENS = 256


def main(model: str, shapes: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part and in all, and the speeds they follow from."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    linear = linear_seconds_per_token(config)
    attention = attention_seconds_per_pair(config, max(1, round(shapes["ancestor_pairs"] / shapes["tokens"])))
    head = head_seconds_per_token(config)
    parts = {
        "linear_s": linear * shapes["tokens"],
        "attention_s": attention * shapes["ancestor_pairs"],
        "head_s": head * shapes["targets"],
    }
    return {"limit_s": sum(parts.values()), **parts, "linear_tokens_per_s": 1 / linear, "head_tokens_per_s": 1 / head}


def linear_seconds_per_token(config: Any) -> float:
    """All linear layers of the decoder, on `CHUNK_TOKENS` tokens at once."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_size, config.num_key_value_heads * head_size
    sizes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    layers = [
        [torch.randn(out, into) for into, out in sizes] for _ in range(config.num_hidden_layers)
    ]  # as many weights as the model: caches as cold
    inputs = {into: torch.randn(CHUNK_TOKENS, into) for into, _ in sizes}

    def run(linear: Linear) -> None:
        for layer in layers:
            for weight in layer:
                linear(inputs[weight.shape[1]], weight)

    return min(median_seconds(partial(run, linear)) for linear in LIBRARIES) / CHUNK_TOKENS


def attention_seconds_per_pair(config: Any, path: int) -> float:
    """Both products of attention, all layers, per pair of a query and a key."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    query = torch.randn(config.num_key_value_heads, groups * QUERY_BLOCK, head_size)
    keys, values = (torch.randn(config.num_key_value_heads, path, head_size) for _ in range(2))

    def run() -> None:
        torch.bmm(torch.bmm(query, keys.transpose(1, 2)), values)

    return median_seconds(run, repeats=50) * config.num_hidden_layers / (QUERY_BLOCK * path)


def head_seconds_per_token(config: Any) -> float:
    """The LM head on `HEAD_TOKENS` tokens."""
    hidden, weight = torch.randn(HEAD_TOKENS, config.hidden_size), torch.randn(config.vocab_size, config.hidden_size)
    return min(median_seconds(partial(linear, hidden, weight), repeats=10) for linear in LIBRARIES) / HEAD_TOKENS


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
        Path(sys.argv[3]).write_text(json.dumps(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
