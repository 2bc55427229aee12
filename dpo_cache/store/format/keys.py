"""Names by content: the key of a completion."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from dpo_cache.types import Completion

KEY_BYTES = 16


def completion_key(completion: Completion) -> bytes:
    """16 bytes that name a completion under its prompt, in any data set, row or side.

    Equals `blake2b(n + prompt + completion, digest_size=16, person=b"dpo-cache/1")`, where `n` is the
    number of prompt tokens and every number is an unsigned 32-bit little-endian integer. The ids are
    those that are scored, after truncation.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"dpo-cache/1")
    digest.update(struct.pack("<I", len(completion.prompt_ids)))
    digest.update(completion.prompt_ids.astype("<u4", copy=False).tobytes())
    digest.update(completion.completion_ids.astype("<u4", copy=False).tobytes())
    return digest.digest()


def key_array(keys: Sequence[bytes]) -> np.ndarray:
    """Keys as a numpy array of dtype S16, which sorts and compares them as bytes."""
    return np.frombuffer(b"".join(keys), f"S{KEY_BYTES}")


def key_halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys of such an array as two uint64 arrays, high and low. They order as the bytes do, and sort far
    faster.
    """
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2)
    return halves[:, 0].astype(np.uint64), halves[:, 1].astype(np.uint64)


def key_order(keys: np.ndarray) -> np.ndarray:
    """Positions that sort such an array, equal keys in their order: int64 `[len(keys)]`."""
    high, low = key_halves(keys)
    order = np.argsort(high)
    in_order = high[order]
    if (in_order[1:] == in_order[:-1]).any():
        return np.lexsort((low, high))
    return order


def key_bounds(keys: np.ndarray) -> np.ndarray:
    """The smallest and the largest key of such an array, which is not empty: S16 `[2]`."""
    high, low = key_halves(keys)
    first, last = np.flatnonzero(high == high.min()), np.flatnonzero(high == high.max())
    return keys[[first[low[first].argmin()], last[low[last].argmax()]]]


def is_sorted(keys: np.ndarray) -> bool:
    """Return whether such an array ascends, each key at most once."""
    high, low = key_halves(keys)
    return bool(((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))).all())


def key_bytes(keys: np.ndarray) -> list[bytes]:
    """Keys of such an array as bytes; its own items lose the zeros at their end."""
    content = keys.tobytes()
    return [content[start : start + KEY_BYTES] for start in range(0, len(content), KEY_BYTES)]
