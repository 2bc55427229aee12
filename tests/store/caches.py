"""Small caches on disk that hold what the tests of upkeep need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.format.pair_tables import PairsDigest
from dpo_cache.store.format.parquet import ParquetReader, name_by_content
from dpo_cache.store.format.shards import SHARD_SCHEMA, check_scores, keys_of
from dpo_cache.types import Completion, Pair, Score, ScoredPair, split_lists

PROVENANCE = {"model": "example/tiny", "revision": None, "device": "cpu"}
SOURCE = {"dataset": "example/pairs", "format": "text", "created": "2025-01-01T00:00:00+00:00"}
TOKENIZATION = {
    "tokenizer": "example/tiny",
    "chat_template": None,
    "max_length": 64,
    "truncation": "keep-start",
    "max_prompt_length": None,
}


def identity(weights: str = "a", dtype: str = "float32") -> dict:
    return {"scoring": 1, "weights": weights * 64, "config": {"model_type": "llama"}, "dtype": dtype}


def completion(number: int) -> Completion:
    """Token ids that depend only on the number; neighbours share prompts."""
    generator = np.random.default_rng(number)
    prompt = np.random.default_rng(number // 2).integers(0, 100, 4).astype(np.uint32)
    return Completion(prompt, generator.integers(0, 100, int(generator.integers(1, 6))).astype(np.uint32))


def value(number: int, shift: float = 0.0) -> Score:
    return Score(
        -np.random.default_rng(number).random(completion(number).num_tokens, np.float32) - np.float32(shift)
    )


def key_of(number: int) -> bytes:
    return completion_key(completion(number))


def add_reference(
    cache: Cache, weights: str = "a", dtype: str = "float32", provenance: dict | None = None
) -> str:
    return cache.publish_reference(identity(weights, dtype), provenance or PROVENANCE)


def add_scores(cache: Cache, reference: str, numbers: Sequence[int], shift: float = 0.0) -> None:
    """One shard."""
    cache.scores(reference).publish([(key_of(number), value(number, shift)) for number in numbers])


def add_pairs(
    cache: Cache,
    reference: str,
    numbers: Sequence[tuple[int, int]],
    name: str = "demo",
    shift: float = 0.0,
    **details: object,
) -> None:
    """A pair set whose rows are these pairs of completions."""
    writer, digest = cache.write_pairs(name, "train"), PairsDigest()
    for row, (chosen, rejected) in enumerate(numbers):
        pair = Pair(row, completion(chosen), completion(rejected))
        writer.add([ScoredPair(pair, value(chosen, shift), value(rejected, shift))])
        digest.add(row, key_of(chosen), key_of(rejected))
    known = {"name": name, "split": "train", "reference": reference, "pairs_digest": digest.hexdigest()}
    writer.finish({**known, "source": SOURCE, "tokenization": TOKENIZATION, **details})


def make_cache(
    root: Path,
    *,
    shards: Sequence[Sequence[int]] = ((0, 1), (2, 3, 4)),
    pairs: Sequence[tuple[int, int]] = ((0, 1), (2, 3)),
) -> Cache:
    """A whole cache of one reference, its shards, and one pair set."""
    cache = open_cache(root, create=True)
    reference = add_reference(cache)
    for numbers in shards:
        add_scores(cache, reference, numbers)
    if pairs:
        add_pairs(cache, reference, pairs)
    return cache


def read_shard_bytes(content: bytes) -> pa.Table:
    """The rows of a score shard as one table; its digest and its values are not checked."""
    groups = ParquetReader(pa.BufferReader(content), SHARD_SCHEMA, "there").read_groups()
    return pa.concat_tables([SHARD_SCHEMA.empty_table(), *groups])


def decode_shard(content: bytes) -> tuple[np.ndarray, list[Score]]:
    """Keys `[N]` (dtype S16) and scores of a shard; `CorruptShardError` where they are not as specified."""
    table = read_shard_bytes(content)
    check_scores(table, "there")
    return keys_of(table.column("key")), list(map(Score, split_lists(table.column("token_logps"))))


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def lie_about_keys(cache: Cache, file: str) -> str:
    """Replace a shard of several row groups by one whose footer claims a smaller first key. Returns its name."""
    content = cache.folder.read(file)
    reader = ParquetReader(pa.BufferReader(content), SHARD_SCHEMA, "there")
    (first, _) = reader.footer.bounds[1]
    smaller = (int.from_bytes(first, "big") - 1).to_bytes(16, "big")
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert content[start:].count(first) == 1
    content = content[:start] + content[start:].replace(first, smaller)
    name = f"{file.rpartition('/')[0]}/{name_by_content(content)}"
    cache.folder.publish(name, content)
    cache.folder.remove(file)
    return name
