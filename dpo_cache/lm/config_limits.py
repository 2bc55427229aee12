"""Lengths in a model's config from which on rows, or chunks of them, may be computed differently.

Short rows say nothing about a window of 4,096 tokens, a temperature that grows from position 8,192 on, or
attention to the best 2,048 keys. So the self-check runs rows and chunks past each such length that the data
reaches. `FIELDS` names the fields of transformers' configs; a field of other code counts if its name has one
of `WORDS`. A field that matters to nothing costs the check a longer row, and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

WINDOW = "window"  # keys that are farther back are not seen
CHUNK = "chunk"  # tokens are computed in blocks of this length
TOP_K = "top-k"  # a token sees only so many keys, which a score chooses
POSITION = "position"  # the computation changes at this position or distance

# Fields whose value is a number of tokens, and what it limits.
FIELDS = {
    "sliding_window": WINDOW,
    "sliding_windows": WINDOW,
    "sliding_window_size": WINDOW,
    "sliding_window_len": WINDOW,
    "window_size": WINDOW,
    "attention_window": WINDOW,
    "attention_window_size": WINDOW,
    "local_attention": WINDOW,
    "local_attention_window_len": WINDOW,
    "keep_window_size": WINDOW,
    "attention_chunk_size": CHUNK,
    "chunk_size": CHUNK,
    "mamba_chunk_size": CHUNK,
    "block_size": CHUNK,
    "local_attn_chunk_length": CHUNK,
    "lsh_attn_chunk_length": CHUNK,
    "index_block_size": CHUNK,
    "compress_rates": CHUNK,
    "indexer_compress_ratio": CHUNK,
    "max_inference_chunksize": CHUNK,
    "mem_len": CHUNK,
    "index_topk": TOP_K,
    "indexer_topk": TOP_K,
    "index_topk_blocks": TOP_K,
    "indexer_budget": TOP_K,
    "floor_scale": POSITION,
    "log_scaling_n_floor": POSITION,
    "original_max_position_embeddings": POSITION,
    "rel_extent": POSITION,
    "relative_max_distance": POSITION,
    "position_bias_max_distance": POSITION,
    "seq_length": POSITION,
    "context_length": POSITION,
}

# Parts of names by which a field of other code counts.
WORDS = {
    TOP_K: re.compile(r"top_?k|budget"),
    CHUNK: re.compile(r"chunk|block|segment|stride|compress"),
    WINDOW: re.compile(r"window|local|span"),
    POSITION: re.compile(
        r"floor|extent|distance|threshold|switch|limit|length|max_(seq|pos)|until|after|from_(pos|token)"
    ),
}

# Fields with one of these words that are no lengths: counts, sizes of experts, rates of sampling.
NO_LENGTHS = re.compile(
    r"^(num|n)_|_num_|layer|expert|moe|router|centroid|topk_(group|method|prob)|^top_k$|sampling|penalty"
    r"|head|dim$|hidden|vocab|token_id|types$|rope_theta|feed_forward|pattern|time_step|mask_|prompt_length"
    r"|limit$|multiple_of|^(min|max|model_max)_length$|^max_(position_embeddings|seq_len)$"
)

# Parts of a config that read no text.
OTHER_INPUTS = re.compile(r"vision|image|video|audio|speech|mel|quantization|generation")

# Rotary embeddings whose angles depend only on the position; others may depend on the length of the row.
STATIC_ROPE = ("default", "linear", "yarn", "llama3", "proportional")
ROPE_BY_LENGTH = ("dynamic", "longrope")
ROPE_FIELDS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "low_freq_factor",
    "high_freq_factor",
    "partial_rotary_factor",
    "truncate",
    "mrope_section",
    "mrope_interleaved",
}


@dataclass(frozen=True, order=True)
class Limit:
    """A length that a config names."""

    tokens: int
    field: str
    kind: str

    def __str__(self) -> str:
        return f"`{self.field}` {self.tokens:,}"


def limits_of(config: PreTrainedConfig) -> list[Limit]:
    """The lengths that the config of a model, its text config and the configs in them name, ascending; one
    for each length and kind.

    A top-k of blocks, or of compressed keys, also counts as so many times their sizes.
    """
    text = config.get_text_config().to_dict()
    own = {name: value for name, value in config.to_dict().items() if not isinstance(value, dict)}
    found = [*_search(text), *_search(own)]
    sizes = [limit for limit in found if limit.kind == CHUNK and re.search("block|compress", limit.field)]
    found += [
        Limit(limit.tokens * size.tokens, limit.field, TOP_K)
        for limit in found
        for size in sizes
        if limit.kind == TOP_K
    ]
    distinct = {(limit.tokens, limit.kind): limit for limit in sorted(found, reverse=True)}
    return sorted(distinct.values())


def rope_limit(config: PreTrainedConfig) -> Limit | None:
    """The length up to which a rotary embedding that depends on the row's length does not; None without one.

    *dynamic* and *longrope* use other angles for all tokens of a row that is longer.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    entries = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    if not any(entry.get("rope_type") in ROPE_BY_LENGTH for entry in entries):
        return None
    lengths = [entry.get("original_max_position_embeddings") for entry in entries]
    lengths.append(getattr(text, "max_position_embeddings", None))
    known = [length for length in lengths if length]
    return Limit(min(known), "original_max_position_embeddings", POSITION) if known else None


def _search(fields: dict[Any, Any]) -> Iterator[Limit]:
    """The limits among the fields and in dicts and lists of them."""
    is_static = fields.get("rope_type") in STATIC_ROPE and fields.keys() <= ROPE_FIELDS
    for name, value in fields.items():
        if not isinstance(name, str) or OTHER_INPUTS.search(name):
            continue
        if is_static and name == "original_max_position_embeddings":
            continue
        if isinstance(value, dict):
            yield from _search(value)
            if name in FIELDS:  # by kind of layer
                yield from _limits(name, list(value.values()), FIELDS[name])
        elif (kind := _kind_of(name)) is not None:
            yield from _limits(name, value if isinstance(value, (list, tuple)) else [value], kind)


def _limits(name: str, values: list[Any] | tuple[Any, ...], kind: str) -> Iterator[Limit]:
    """A limit for each different value that is a number of at least two tokens; layers may differ."""
    lengths = {int(value) for value in values if _is_length(value)}
    yield from (Limit(length, name, kind) for length in lengths)


def _is_length(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 2 <= value < 2**40 and value == int(value)


def _kind_of(name: str) -> str | None:
    if name in FIELDS:
        return FIELDS[name]
    if NO_LENGTHS.search(name):
        return None
    return next((kind for kind, words in WORDS.items() if words.search(name)), None)
