"""One file of a cache, from its bytes: is it whole, and does it say what its columns promise?

Each check raises `CorruptShardError` whose first line says what was expected and found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.comparing import Values, values_of
from dpo_cache.store.documents import Document
from dpo_cache.store.keys import completion_key, key_bytes
from dpo_cache.store.pairs import PAIR_SCHEMA, PairsDigest, check_pairs
from dpo_cache.store.parquet import ParquetReader, check_content
from dpo_cache.store.shards import SHARD_SCHEMA, keys_of
from dpo_cache.types import Completion, split_lists


@dataclass(frozen=True)
class WholeShard:
    """A score shard in which nothing is wrong."""

    file: str
    num_rows: int
    num_tokens: int


def check_shard(file: str, content: bytes) -> WholeShard:
    """Digest, schema, and every row of a score shard."""
    num_tokens, keys = 0, []
    for table in _groups(file, content, SHARD_SCHEMA):
        values = values_of(table, "key", "token_logps")
        _check_sums(file, values, table.column("num_tokens"), table.column("logps"))
        num_tokens += len(values.flat)
        keys.append(values.keys)
    together = np.concatenate(keys) if keys else np.empty(0, "S16")
    if not len(together) or len(np.unique(together)) != len(together):
        raise CorruptShardError(f"{file}: no completions, or one of them twice.")
    return WholeShard(file, len(together), num_tokens)


def check_part(file: str, content: bytes, promised: Document, digest: PairsDigest, *, has_token_logps: bool = True) -> int:
    """Digest, schema, and every row of a part of a pair set; its pairs are added to the digest. Returns the number of pairs."""
    if len(content) != promised["bytes"]:
        raise CorruptShardError(f"{file}: the manifest promises {promised['bytes']} bytes, found {len(content)}.")
    num_rows = 0
    for table in _groups(file, content, PAIR_SCHEMA):
        num_rows += len(table)
        check_pairs(table, file, has_token_logps=has_token_logps)
        keys = [_check_keys(file, table, side) for side in ("chosen", "rejected")]
        for row, chosen, rejected in zip(table.column("row").to_pylist(), *keys, strict=True):
            digest.add(row, chosen, rejected)
    if num_rows != promised["rows"]:
        raise CorruptShardError(f"{file}: the manifest promises {promised['rows']} pairs, found {num_rows}.")
    return num_rows


def check_manifest(manifest: Document, name: str) -> Document:
    """The manifest, if it is of the pair set `NAME/SPLIT` and has what a reader needs."""
    if f"{manifest.get('name')}/{manifest.get('split')}" != name:
        raise CorruptShardError(f"pairs/{name}/manifest.json: it is the manifest of {manifest.get('name')}/{manifest.get('split')}.")
    lacking = {"reference", "pairs_digest", "source", "tokenization"} - manifest.keys()
    if lacking or any({"file", "rows", "bytes"} - part.keys() for part in manifest["parts"]):
        raise CorruptShardError(f"pairs/{name}/manifest.json: it lacks {', '.join(sorted(lacking)) or 'file, rows or bytes of a part'}.")
    return manifest


def _groups(file: str, content: bytes, schema: pa.Schema) -> Iterator[pa.Table]:
    """The row groups of a Parquet file whose bytes hash to its name."""
    check_content(content, file.rpartition("/")[2], file)
    reader = ParquetReader(pa.BufferReader(content), schema, file)
    for group in range(len(reader.group_rows)):
        yield reader.read_group(group)


def _check_keys(file: str, table: pa.Table, side: str) -> list[bytes]:
    """That the keys of the chosen or the rejected answers are those of the token ids. Returns them."""
    prompts, answers = split_lists(table.column("prompt_ids")), split_lists(table.column(f"{side}_ids"))
    if side == "rejected":
        own = table.column("rejected_prompt_ids").to_pylist()
        prompts = [prompt if ids is None else np.array(ids, np.uint32) for prompt, ids in zip(prompts, own, strict=True)]
    stored = key_bytes(keys_of(table.column(f"{side}_key")))
    for row, (prompt, answer, key) in enumerate(zip(prompts, answers, stored, strict=True)):
        if completion_key(Completion(prompt, answer)) != key:
            raise CorruptShardError(f"{file}: pair {row} of a row group has token ids that its {side}_key is not of.")
    return stored


def _check_sums(file: str, values: Values, num_tokens: pa.ChunkedArray, logps: pa.ChunkedArray) -> None:
    if not values.lengths.all() or (num_tokens.to_numpy() != values.lengths).any():
        raise CorruptShardError(f"{file}: num_tokens and the lengths of token_logps differ, or are 0.")
    if not np.isfinite(values.flat).all():
        raise CorruptShardError(f"{file}: a log-prob is NaN or infinite.")
    sums = np.add.reduceat(values.flat, values.starts, dtype=np.float64)
    if not np.allclose(sums, logps.to_numpy(), rtol=1e-9, atol=1e-9):
        raise CorruptShardError(f"{file}: logps are not the sums of token_logps.")
