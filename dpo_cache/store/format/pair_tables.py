"""The files of a pair set: `pairs/<name>/<split>/manifest.json` and its parts, tokenized pairs with
log-probs.

Each `<sha256>.parquet` part has one row a pair, in the order of the data set:

    row                        int64                   row number in the data set, from 0
    prompt_ids                 list<uint32>            prompt of chosen, and of rejected where the next is
                               null
    rejected_prompt_ids        list<uint32> or null    prompt of rejected where `keep-end` truncation made
                               it differ
    chosen_ids, rejected_ids                           list<uint32>, completion tokens
    chosen_key, rejected_key                           fixed_size_binary(16), see `keys.py`
    chosen_num_tokens, rejected_num_tokens             uint32
    ref_chosen_logps, ref_rejected_logps               float64, sums in nats
    ref_chosen_token_logps, ref_rejected_token_logps   list<float32>, nats; one a token, or all empty: see
                                                       below

A pair set made by `dpo-cache import` has `"imported": true` in its manifest. If only sums were imported, the
manifest has `"token_logps": false` and all lists of token log-probs are empty.

`manifest.json` (a sealed document, see `documents.py`) is published last and names the parts, so a pair
set is complete or absent, and a reader keeps the parts it started with whatever is published later.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.folders.local_copies import is_part_name
from dpo_cache.store.format.documents import Document, read_sealed
from dpo_cache.store.format.keys import completion_key
from dpo_cache.store.format.member_kinds import MANIFEST, wrong_members
from dpo_cache.store.format.parquet import REMEDY
from dpo_cache.store.format.shards import (
    FLOAT_LIST,
    KEY,
    TOKEN_LIST,
    are_only_sums,
    key_column,
    list_array,
    list_lengths,
    lists_agree,
)
from dpo_cache.types import Completion, Pair, Score, ScoredPair, split_lists

SIDES = ("chosen", "rejected")
MOST_PART_PAIRS = 8192
MANIFEST_FORMAT = "dpo-cache pairs"
# members, and their kinds
OPTIONAL = {"source": dict, "tokenization": dict, "pairs_digest": str, "imported": bool, "token_logps": bool}
PAIR_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_ids", TOKEN_LIST, nullable=False),
        pa.field("rejected_prompt_ids", TOKEN_LIST),
        pa.field("chosen_ids", TOKEN_LIST, nullable=False),
        pa.field("rejected_ids", TOKEN_LIST, nullable=False),
        pa.field("chosen_key", KEY, nullable=False),
        pa.field("rejected_key", KEY, nullable=False),
        pa.field("chosen_num_tokens", pa.uint32(), nullable=False),
        pa.field("rejected_num_tokens", pa.uint32(), nullable=False),
        pa.field("ref_chosen_logps", pa.float64(), nullable=False),
        pa.field("ref_rejected_logps", pa.float64(), nullable=False),
        pa.field("ref_chosen_token_logps", FLOAT_LIST, nullable=False),
        pa.field("ref_rejected_token_logps", FLOAT_LIST, nullable=False),
    ]
)


class PairsDigest:
    """Hex sha256 over the rows and completion keys of a pair set, in order: the same pairs, the same
    digest.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"dpo-cache pairs/1")

    def add(self, row: int, chosen_key: bytes, rejected_key: bytes) -> None:
        self._digest.update(struct.pack("<q", row) + chosen_key + rejected_key)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def read_manifest(folder: Folder, place: str) -> Document:
    """The manifest of a pair set, checked: its parts are files of its folder, of sizes within the limits."""
    name = f"{place}/manifest.json"
    manifest = read_sealed(folder, name)
    if problem := _manifest_problem(manifest, place):
        raise CorruptShardError(f"{folder}/{name}: {problem}")
    return manifest


def created_of(manifest: Document) -> str:
    """When the manifest was made, as text that sorts by time; empty if the manifest has no time."""
    source = manifest.get("source")
    created = source.get("created") if isinstance(source, dict) else None
    return created if isinstance(created, str) else ""


def part_files(manifest: Document) -> dict[str, Document]:
    """The manifest's parts by their names from the root of the cache."""
    place = f"pairs/{manifest['name']}/{manifest['split']}"
    return {f"{place}/{part['file']}": part for part in manifest["parts"]}


def check_pairs(table: pa.Table, place: str, *, has_token_logps: bool = True) -> None:
    """Raise `CorruptShardError` unless a part's columns agree with each other and with the format."""
    for batch in table.to_batches():
        if not _columns_agree(batch, has_token_logps):
            raise CorruptShardError(
                f"{place}: its columns disagree with each other, or values are not log-probs. {REMEDY}"
            )


def _manifest_problem(manifest: Document, place: str) -> str | None:
    """The first thing that is wrong with a manifest, or None."""
    parts: Any = manifest.get("parts")
    name, split = manifest.get("name"), manifest.get("split")
    is_list = isinstance(parts, list) and all(map(_is_part, parts))
    if manifest.get("format") != MANIFEST_FORMAT or not is_list:
        return (
            f"expected the manifest of a {MANIFEST_FORMAT!r} with parts of at most {MOST_PART_PAIRS} pairs."
        )
    if f"pairs/{name}/{split}" != place:
        return f"it belongs to {str(name)[:128]!r}, {str(split)[:128]!r}."
    reference = manifest.get("reference")
    if not isinstance(reference, str) or not re.fullmatch("[0-9a-f]{64}", reference):
        return "its reference is not a sha256."
    if wrong := [name for name, kind in OPTIONAL.items() if not isinstance(manifest.get(name, kind()), kind)]:
        return f"its member {wrong[0]} is of the wrong kind."
    if wrong := wrong_members(manifest, MANIFEST):
        return f"its member {wrong[0]} is of the wrong kind."
    parts_rows = sum(part["rows"] for part in parts)
    if manifest.get("num_pairs") != parts_rows:
        return f"{manifest.get('num_pairs')!r:.20} pairs promised, {parts_rows} in its parts."
    return None


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or part.keys() != {"file", "rows", "bytes"}:
        return False
    numbers = (part["rows"], part["bytes"])
    is_named = isinstance(part["file"], str) and is_part_name(part["file"])
    return (
        is_named
        and all(type(number) is int and number > 0 for number in numbers)
        and part["rows"] <= MOST_PART_PAIRS
    )


def _columns_agree(batch: pa.RecordBatch, has_token_logps: bool) -> bool:
    for side in SIDES:
        num_tokens = batch.column(f"{side}_num_tokens")
        token_logps, logps = batch.column(f"ref_{side}_token_logps"), batch.column(f"ref_{side}_logps")
        check_values = lists_agree if has_token_logps else are_only_sums
        if not check_values(token_logps, num_tokens, logps):
            return False
        if (list_lengths(batch.column(f"{side}_ids")) != num_tokens.to_numpy()).any():
            return False
    rejected = batch.column("rejected_prompt_ids")
    is_empty = rejected.is_valid().to_numpy(zero_copy_only=False) & (list_lengths(rejected) == 0)
    no_prompt = (list_lengths(batch.column("prompt_ids")) == 0) | is_empty
    return not no_prompt.any() and bool((batch.column("row").to_numpy() >= 0).all())


def pair_table(pairs: Sequence[ScoredPair]) -> pa.Table:
    sides = [(scored.pair.chosen, scored.pair.rejected) for scored in pairs]
    columns = {
        "row": pa.array([scored.pair.row for scored in pairs], pa.int64()),
        "prompt_ids": list_array([chosen.prompt_ids for chosen, _ in sides], TOKEN_LIST),
        "rejected_prompt_ids": pa.array(
            [_own_prompt(chosen, rejected) for chosen, rejected in sides], TOKEN_LIST
        ),
        "chosen_ids": list_array([chosen.completion_ids for chosen, _ in sides], TOKEN_LIST),
        "rejected_ids": list_array([rejected.completion_ids for _, rejected in sides], TOKEN_LIST),
        "chosen_key": key_column([completion_key(chosen) for chosen, _ in sides]),
        "rejected_key": key_column([completion_key(rejected) for _, rejected in sides]),
        "chosen_num_tokens": pa.array([chosen.num_tokens for chosen, _ in sides], pa.uint32()),
        "rejected_num_tokens": pa.array([rejected.num_tokens for _, rejected in sides], pa.uint32()),
        "ref_chosen_logps": pa.array([scored.ref_chosen.logps for scored in pairs], pa.float64()),
        "ref_rejected_logps": pa.array([scored.ref_rejected.logps for scored in pairs], pa.float64()),
        "ref_chosen_token_logps": list_array([scored.ref_chosen.token_logps for scored in pairs], FLOAT_LIST),
        "ref_rejected_token_logps": list_array(
            [scored.ref_rejected.token_logps for scored in pairs], FLOAT_LIST
        ),
    }
    return pa.table([columns[name] for name in PAIR_SCHEMA.names], schema=PAIR_SCHEMA)


def _own_prompt(chosen: Completion, rejected: Completion) -> np.ndarray | None:
    return None if np.array_equal(chosen.prompt_ids, rejected.prompt_ids) else rejected.prompt_ids


def decode_pairs(table: pa.Table, *, has_token_logps: bool = True) -> list[ScoredPair]:
    """One object a row; their arrays are views of the table's memory."""
    pairs = map(Pair, table.column("row").to_pylist(), *(decode_completions(table, side) for side in SIDES))
    return list(map(ScoredPair, pairs, *(_decode_scores(table, side, has_token_logps) for side in SIDES)))


def decode_completions(table: pa.Table, side: str) -> list[Completion]:
    """The chosen or the rejected completions; their arrays are views of the table's memory."""
    prompts, others = split_lists(table.column("prompt_ids")), table.column("rejected_prompt_ids")
    if side == "rejected" and others.null_count < len(others):
        prompts = [
            other if differs else prompt
            for other, differs, prompt in zip(
                split_lists(others), others.is_valid().to_pylist(), prompts, strict=True
            )
        ]
    return list(map(Completion, prompts, split_lists(table.column(f"{side}_ids"))))


def _decode_scores(table: pa.Table, side: str, has_token_logps: bool) -> list[Score]:
    values = split_lists(table.column(f"ref_{side}_token_logps"))
    if has_token_logps:
        return list(map(Score, values))
    return list(map(Score, values, table.column(f"ref_{side}_logps").to_pylist()))  # imported sums
