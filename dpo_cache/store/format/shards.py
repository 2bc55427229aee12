"""Score shards: `references/<id>/scores/<sha256>.parquet`, one row a completion.

    key          fixed_size_binary(16)   completion key (see `keys.py`); distinct within a shard
    num_tokens   uint32                  completion tokens, at least 1
    logps        float64                 sum of token_logps, in nats
    token_logps  list<float32>           log-probability of each completion token, see `types.are_logps`

Plain Parquet with page checksums; the file's name is the sha256 of its bytes (see `parquet.py`). The footer
has the smallest and the largest key of each row group. Where these ascend from group to group, as in shards
that `compact` made, the keys of a range are read without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.keys import KEY_BYTES, key_array, key_bounds, key_bytes
from dpo_cache.store.format.page_limits import Footer
from dpo_cache.store.format.parquet import REMEDY, ParquetBuilder, open_unverified, open_verified
from dpo_cache.types import Score, are_logps

FLOAT_LIST = pa.list_(pa.field("element", pa.float32(), nullable=False))
TOKEN_LIST = pa.list_(pa.field("element", pa.uint32(), nullable=False))
KEY = pa.binary(KEY_BYTES)

ROW_GROUP_BYTES = 4 * 2**20  # in memory: the least that a look-up reads
ROW_BYTES = 32  # in memory, of a completion without its token log-probs, roughly

SHARD_SCHEMA = pa.schema(
    [
        pa.field("key", KEY, nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("logps", pa.float64(), nullable=False),
        pa.field("token_logps", FLOAT_LIST, nullable=False),
    ]
)


def encode_shard(scores: Sequence[tuple[bytes, Score]]) -> bytes:
    """The file for these completions' scores. Raises `ValueError` for one that is empty or no log-prob."""
    for key, score in scores:
        if not len(score.token_logps) or not are_logps(score.token_logps):
            raise ValueError(f"completion {key.hex()}: token log-probs are empty or not log-probs")
    table = pa.table(
        [
            key_column([key for key, _ in scores]),
            pa.array([len(score.token_logps) for _, score in scores], pa.uint32()),
            pa.array([score.logps for _, score in scores], pa.float64()),
            list_array([score.token_logps for _, score in scores], FLOAT_LIST),
        ],
        schema=SHARD_SCHEMA,
    )
    builder = ParquetBuilder(SHARD_SCHEMA)
    for group in cut(table, ROW_GROUP_BYTES):
        builder.add(group)
    return builder.finish()


def read_shard(folder: Folder, name: str) -> Iterator[pa.Table]:
    """The shard's rows, one checked row group at a time. The bytes of the whole shard are hashed first."""
    with open_verified(folder, name, SHARD_SCHEMA) as reader:
        for table in reader.read_groups():
            check_scores(table, reader.place)
            yield table


def read_keys(folder: Folder, name: str) -> list[np.ndarray]:
    """The shard's keys, S16, one array a row group. Its bytes are not hashed."""
    with open_unverified(folder, name, SHARD_SCHEMA) as reader:
        return [keys_of(table.column("key")) for table in reader.read_groups(["key"])]


def group_bounds(footer: Footer) -> np.ndarray | None:
    """The smallest and the largest key of each row group, S16 `[groups, 2]`, as the footer claims. None
    unless it has them of all groups, and they ascend without overlap.
    """
    claimed = [bounds for bounds in footer.bounds if bounds and len(bounds[0]) == len(bounds[1]) == KEY_BYTES]
    keys = [key for bounds in claimed for key in bounds]
    if not keys or len(claimed) < len(footer.bounds):
        return None
    is_apart = all(last < first for last, first in zip(keys[1::2], keys[2::2], strict=False))
    is_ordered = all(first <= last for first, last in claimed)
    return key_array(keys).reshape(-1, 2) if is_apart and is_ordered else None


def check_bounds(keys: np.ndarray, claimed: Sequence[bytes] | np.ndarray, place: str) -> None:
    """Raise `CorruptShardError` unless these are the smallest and the largest of a row group's keys."""
    if not len(keys) or key_bytes(key_bounds(keys)) != [key.ljust(KEY_BYTES, b"\0") for key in claimed]:
        raise CorruptShardError(f"{place}: its footer claims other keys than its row groups have. {REMEDY}")


def check_scores(table: pa.Table, place: str) -> None:
    """Raise `CorruptShardError` unless a shard's columns agree with each other and all values are
    log-probs.
    """
    for chunk in table.to_batches():
        lists = chunk.column("token_logps")
        if not lists_agree(lists, chunk.column("num_tokens"), chunk.column("logps")):
            raise CorruptShardError(
                f"{place}: num_tokens or logps disagree with token_logps, or are not log-probs. {REMEDY}"
            )


def lists_agree(token_logps: pa.ListArray, num_tokens: pa.Array, logps: pa.Array) -> bool:
    """Return whether each list has only log-probs, is not empty, is `num_tokens` long, and adds up to its
    `logps` within 1e-9 relative.
    """
    offsets, sums = token_logps.offsets.to_numpy(), logps.to_numpy()
    lengths = np.diff(offsets)
    if not len(lengths):
        return True
    if (lengths != num_tokens.to_numpy()).any() or not lengths.all():
        return False
    values = token_logps.values.to_numpy()[offsets[0] : offsets[-1]]
    if not are_logps(values):
        return False
    added = np.add.reduceat(values, offsets[:-1] - offsets[0], dtype=np.float64)
    return bool(np.isfinite(sums).all() and np.allclose(added, sums, rtol=1e-9, atol=1e-9))


def are_only_sums(token_logps: pa.ListArray, num_tokens: pa.Array, logps: pa.Array) -> bool:
    """Return whether each list is empty and each of the `logps` a sum of log-probs, as in a pair set imported
    without values per token.
    """
    lengths = num_tokens.to_numpy()
    return (
        not list_lengths(token_logps).any()
        and bool(lengths.all())
        and are_logps(logps.to_numpy(), lengths.astype(np.float64))
    )


def row_bytes(table: pa.Table) -> np.ndarray:
    """Approximate bytes that each row takes in memory: int64 `[len(table)]`."""
    return table.column("num_tokens").to_numpy().astype(np.int64) * 4 + ROW_BYTES


def cut(table: pa.Table, most_bytes: int) -> Iterator[pa.Table]:
    """The table in the longest pieces of at most `most_bytes` each, or of one row."""
    ends = np.cumsum(row_bytes(table))
    start = 0
    while start < len(table):
        spent = int(ends[start - 1]) if start else 0
        end = max(int(np.searchsorted(ends, spent + most_bytes, side="right")), start + 1)
        yield table.slice(start, end - start)
        start = end


def list_lengths(column: pa.ListArray) -> np.ndarray:
    """Items of each list, 0 for one that is null: `[len(column)]`."""
    return np.diff(column.offsets.to_numpy())


def key_column(keys: Sequence[bytes]) -> pa.Array:
    return pa.array(keys, KEY)


def keys_of(column: pa.ChunkedArray) -> np.ndarray:
    """Keys as a numpy array of dtype S16, which sorts and compares them as bytes."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], f"S{KEY_BYTES}", len(chunk), chunk.offset * KEY_BYTES)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, f"S{KEY_BYTES}")


def list_array(values: Sequence[np.ndarray], kind: pa.ListType) -> pa.Array:
    """A list column from one numpy array a row."""
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    flat = np.concatenate(values) if len(values) else np.empty(0, kind.value_type.to_pandas_dtype())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, kind.value_type), type=kind)
