"""Checks of one file of a cache, from its bytes: its digest, its schema, and that its columns agree.

Each check raises `CorruptShardError`, whose first line names what was expected and found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError, printable
from dpo_cache.store.format.documents import DOCUMENT_BYTES, REMEDY, Document
from dpo_cache.store.format.keys import completion_key, is_sorted, key_bytes, key_order
from dpo_cache.store.format.member_kinds import MANIFEST, wrong_members
from dpo_cache.store.format.page_limits import FILE_BYTES
from dpo_cache.store.format.pair_tables import (
    PAIR_SCHEMA,
    SIDES,
    PairsDigest,
    check_pairs,
    decode_completions,
)
from dpo_cache.store.format.parquet import ParquetReader, check_content
from dpo_cache.store.format.shards import SHARD_SCHEMA, check_bounds, check_scores, keys_of

REQUIRED = {  # members of a manifest, and those of their members that say how the pairs were made
    "source": ("dataset", "format"),
    "tokenization": ("tokenizer", "max_length", "truncation"),
}
DTYPES = ("float32", "float16", "bfloat16")  # a reference that dpo-cache scores has one of these


@dataclass(frozen=True)
class WholeShard:
    """A score shard in which nothing is wrong."""

    file: str
    num_rows: int


def most_bytes_of(file: str) -> int:
    """The most bytes that a file of this name may have."""
    return FILE_BYTES if file.endswith(".parquet") else DOCUMENT_BYTES


def check_shard(file: str, content: bytes) -> WholeShard:
    """Check digest, schema, every row of a score shard, and the keys that its footer claims."""
    reader, keys = _open(file, content, SHARD_SCHEMA), [np.empty(0, "S16")]
    for table, claimed in zip(reader.read_groups(), reader.footer.bounds, strict=True):
        check_scores(table, file)
        keys.append(keys_of(table.column("key")))
        if claimed is not None:
            check_bounds(keys[-1], claimed, file)
    together = np.concatenate(keys)
    if not len(together) or not is_sorted(together[key_order(together)]):
        raise CorruptShardError(f"{file}: no completions, or one of them twice.")
    return WholeShard(file, len(together))


def check_part(
    file: str, content: bytes, promised: Document, digest: PairsDigest, *, has_token_logps: bool = True
) -> int:
    """Check digest, schema, and every row of a part of a pair set, and add its pairs to the digest. Returns
    the number of pairs.
    """
    if len(content) != promised["bytes"]:
        raise CorruptShardError(
            f"{file}: the manifest promises {promised['bytes']} bytes, found {len(content)}."
        )
    num_rows = 0
    for table in _open(file, content, PAIR_SCHEMA).read_groups():
        num_rows += len(table)
        check_pairs(table, file, has_token_logps=has_token_logps)
        keys = [_check_keys(file, table, side) for side in SIDES]
        for row, chosen, rejected in zip(table.column("row").to_pylist(), *keys, strict=True):
            digest.add(row, chosen, rejected)
    if num_rows != promised["rows"]:
        raise CorruptShardError(f"{file}: the manifest promises {promised['rows']} pairs, found {num_rows}.")
    return num_rows


def check_details(manifest: Document, place: str) -> Document:
    """The manifest, if it describes how its pairs were made, as training, exporting, merging and verifying
    require. Raises `CorruptShardError`.
    """
    wrong = [] if isinstance(manifest.get("pairs_digest"), str) else ["pairs_digest"]
    wrong += wrong_members(manifest, MANIFEST)
    wrong += [
        f"{member}.{name}"
        for member, names in REQUIRED.items()
        for name in names
        if name not in manifest.get(member, {})
    ]
    if wrong:
        raise CorruptShardError(f"{place}: {', '.join(wrong)}: missing, or of the wrong kind.\n{REMEDY}")
    return manifest


def check_identity(reference: Document, place: str) -> Document:
    """The reference's entry, if its identity has a dtype that log-probs are computed in; an imported one may
    have none. Raises `CorruptShardError`.
    """
    identity = reference["identity"]
    found = identity.get("dtype")
    if found not in DTYPES and not ("imported" in identity and found is None):
        raise CorruptShardError(
            f"{place}: expected a dtype of {', '.join(DTYPES)} in its identity, found "
            f"{printable(repr(found)):.80}.\n{REMEDY}"
        )
    return reference


def _open(file: str, content: bytes, schema: pa.Schema) -> ParquetReader:
    """A Parquet file whose bytes hash to its name."""
    check_content(content, file, file)
    return ParquetReader(pa.BufferReader(content), schema, file)


def _check_keys(file: str, table: pa.Table, side: str) -> list[bytes]:
    """Check that the keys of the chosen or the rejected completions are those of their token ids. Returns the
    keys.
    """
    stored = key_bytes(keys_of(table.column(f"{side}_key")))
    for row, (completion, key) in enumerate(zip(decode_completions(table, side), stored, strict=True)):
        if completion_key(completion) != key:
            raise CorruptShardError(
                f"{file}: pair {row} of a row group has a {side}_key that is not of its token ids."
            )
    return stored
