"""Score shards: `references/<id>/scores/<sha256>.parquet`, one row a completion.

    key          fixed_size_binary(16)   completion key (see `keys.py`); distinct within a shard
    num_tokens   uint32                  completion tokens, at least 1
    logps        float64                 sum of token_logps, in nats
    token_logps  list<float32>           natural-log probability of each completion token, all finite

Plain Parquet with page checksums; the file's name is the sha256 of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.failures import raise_refusal
from dpo_cache.store.keys import KEY_BYTES
from dpo_cache.types import Score, split_lists

FLOAT_LIST = pa.list_(pa.field("element", pa.float32(), nullable=False))
TOKEN_LIST = pa.list_(pa.field("element", pa.uint32(), nullable=False))
KEY = pa.binary(KEY_BYTES)

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", KEY, nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("logps", pa.float64(), nullable=False),
        pa.field("token_logps", FLOAT_LIST, nullable=False),
    ]
)


def encode_shard(scores: Sequence[tuple[bytes, Score]]) -> bytes:
    """The file for these completions' scores. Raises `ValueError` for a score that is empty or not finite."""
    for key, score in scores:
        if not len(score.token_logps) or not np.isfinite(score.token_logps).all():
            raise ValueError(f"completion {key.hex()}: token log-probs are empty or not finite")
    table = pa.table(
        [
            key_column([key for key, _ in scores]),
            pa.array([len(score.token_logps) for _, score in scores], pa.uint32()),
            pa.array([score.logps for _, score in scores], pa.float64()),
            list_array([score.token_logps for _, score in scores], FLOAT_LIST),
        ],
        schema=SHARD_SCHEMA,
    )
    return write_parquet(table, row_group_size=len(scores))


def decode_shard(content: bytes, place: str) -> tuple[np.ndarray, list[Score]]:
    """Keys `[N]` (dtype S16) and scores of a shard; `CorruptShardError` where the content is not as specified."""
    table = read_parquet(content, SHARD_SCHEMA, place)
    token_logps = split_lists(table.column("token_logps"))
    logps = table.column("logps").to_numpy()
    num_tokens = table.column("num_tokens").to_numpy()
    scores = [Score(values) for values in token_logps]
    sums = np.array([score.logps for score in scores], np.float64)
    agrees = not (num_tokens != [len(values) for values in token_logps]).any() and np.allclose(sums, logps, rtol=1e-9, atol=1e-9)
    if not agrees or not np.isfinite(logps).all() or not num_tokens.all():
        raise CorruptShardError(f"{place}: num_tokens or logps disagree with token_logps, or are no numbers. {REMEDY}")
    return keys_of(table.column("key")), scores


def name_by_content(content: bytes) -> str:
    """The file's name: hex sha256 of its bytes."""
    return hashlib.sha256(content).hexdigest() + ".parquet"


def check_content(content: bytes, name: str, place: str) -> None:
    """Raise `CorruptShardError` unless the file's bytes hash to its name."""
    found = name_by_content(content)
    if found != name:
        raise CorruptShardError(f"{place}: its bytes hash to {found[:12]}…, not to its name. {REMEDY}")


REMEDY = "The file was changed or damaged.\nDelete it and run the `dpo-cache precompute` that made it again: it scores only what is missing."


def write_parquet(table: pa.Table, row_group_size: int) -> bytes:
    """Parquet bytes as every file of the cache has them: zstd, page checksums, no hidden Arrow schema."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, row_group_size=max(1, row_group_size), compression="zstd", use_dictionary=False,
        write_page_checksum=True, store_schema=False,
    )  # fmt: skip
    return sink.getvalue().to_pybytes()


def read_parquet(content: bytes, schema: pa.Schema, place: str) -> pa.Table:
    """The table, if it has exactly this schema; else `CorruptShardError`."""
    return open_parquet(pa.BufferReader(content), schema, place).read()


def open_parquet(source: Any, schema: pa.Schema, place: str) -> pq.ParquetFile:
    """An open Parquet file, its schema checked, its pages checked as they are read."""
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True, arrow_extensions_enabled=False)
        found = file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise_refusal(place, error)
        raise CorruptShardError(f"{place}: not readable as Parquet ({error}). {REMEDY}") from error
    if not found.equals(schema):
        raise CorruptShardError(f"{place}: expected the columns\n{schema}\nfound\n{found}")
    return file


def key_column(keys: Sequence[bytes]) -> pa.Array:
    return pa.array(keys, KEY)


def keys_of(column: pa.ChunkedArray) -> np.ndarray:
    """Keys as a numpy array of dtype S16, which sorts and compares them as bytes."""
    chunks = [np.frombuffer(chunk.buffers()[1], f"S{KEY_BYTES}", len(chunk), chunk.offset * KEY_BYTES) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, f"S{KEY_BYTES}")


def list_array(values: Sequence[np.ndarray], kind: pa.ListType) -> pa.Array:
    """A list column from one numpy array a row."""
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate(values) if len(values) else np.empty(0, kind.value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type), type=kind)
