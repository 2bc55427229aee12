"""Pair sets: `pairs/<name>/<split>/`, tokenized pairs joined with one reference's log-probs.

Each `<sha256>.parquet` part has one row a pair, in the order of the data set:

    row                        int64                   row number in the data set, from 0
    prompt_ids                 list<uint32>            prompt of chosen, and of rejected unless the next says otherwise
    rejected_prompt_ids        list<uint32> or null    prompt of rejected where `keep-end` truncation left another one
    chosen_ids, rejected_ids                           list<uint32>, completion tokens
    chosen_key, rejected_key                           fixed_size_binary(16), see `keys.py`
    chosen_num_tokens, rejected_num_tokens             uint32
    ref_chosen_logps, ref_rejected_logps               float64, sums in nats
    ref_chosen_token_logps, ref_rejected_token_logps   list<float32>, nats; one a token, or all empty: see below

A pair set made by `dpo-cache import` has `"imported": true` in its manifest. Where it was given sums alone, the
manifest says `"token_logps": false` and the lists of token log-probs are empty, every one.

`manifest.json` (a sealed document, see `documents.py`) is published last and names the parts, so a pair
set is wholly there or absent, and a reader keeps the parts it started with whatever is published later.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.documents import Document, open_sealed, seal_document
from dpo_cache.store.files import Folder
from dpo_cache.store.keys import completion_key
from dpo_cache.store.shards import (
    FLOAT_LIST,
    KEY,
    REMEDY,
    TOKEN_LIST,
    check_content,
    key_column,
    list_array,
    name_by_content,
    open_parquet,
    write_parquet,
)
from dpo_cache.types import Completion, Pair, Score, ScoredPair, split_lists

ROW_GROUP_PAIRS = 256  # the unit that is read, and shuffled, at once
PART_PAIRS = 8192

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


class PairSet:
    """An open pair set. Iterating streams it from disk in the order of the data set.

    for pair in pair_set:
        pair.pair.chosen.completion_ids, pair.ref_chosen.logps
    """

    def __init__(self, folder: Folder, place: str, manifest: Document):
        self._folder, self._place, self.manifest = folder, place, manifest
        self._checked: dict[str, Any] = {}
        self._blocks = [
            (part["file"], group, min(ROW_GROUP_PAIRS, part["rows"] - group * ROW_GROUP_PAIRS))
            for part in manifest["parts"]
            for group in range(-(-part["rows"] // ROW_GROUP_PAIRS))
        ]

    @property
    def name(self) -> str:
        """`NAME/SPLIT`."""
        return f"{self.manifest['name']}/{self.manifest['split']}"

    @property
    def reference_id(self) -> str:
        """Id of the reference whose log-probs these are."""
        return self.manifest["reference"]

    @property
    def is_imported(self) -> bool:
        """Whether the log-probs were made elsewhere and brought in by `dpo-cache import`."""
        return self.manifest.get("imported", False)

    @property
    def has_token_logps(self) -> bool:
        """Whether there is a log-prob for each token; False where an import had sums alone."""
        return self.manifest.get("token_logps", True)

    def __len__(self) -> int:
        return self.manifest["num_pairs"]

    def __iter__(self) -> Iterator[ScoredPair]:
        for block in range(len(self._blocks)):
            yield from self.read_block(block)

    @property
    def block_sizes(self) -> list[int]:
        """Pairs in each block; blocks are the units that can be read in any order."""
        return [num_pairs for _, _, num_pairs in self._blocks]

    def is_complete(self) -> bool:
        """Whether every part that the manifest names is there."""
        return all(self._folder.exists(f"{self._place}/{part['file']}") for part in self.manifest["parts"])

    def read_block(self, block: int) -> list[ScoredPair]:
        """The pairs of one block. A part's digest is checked when it is first read."""
        name, group, num_pairs = self._blocks[block]
        place = f"{self._folder}/{self._place}/{name}"
        file = self._open_part(name, place)
        try:
            table = file.read_row_group(group)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise CorruptShardError(f"{place}: row group {group} is not readable ({error}). {REMEDY}") from error
        if table.num_rows != num_pairs:
            raise CorruptShardError(f"{place}: expected {num_pairs} pairs in row group {group}, found {table.num_rows}. {REMEDY}")
        pairs = _decode_pairs(table) if self.has_token_logps else _with_sums_alone(table, _decode_pairs(table))
        self._check_lengths(pairs, f"{place}: row group {group}")
        return pairs

    def _check_lengths(self, pairs: Sequence[ScoredPair], place: str) -> None:
        """Raise `CorruptShardError` unless each completion has one log-prob a token, or none where the manifest says so."""
        for scored in pairs:
            for completion, score in ((scored.pair.chosen, scored.ref_chosen), (scored.pair.rejected, scored.ref_rejected)):
                expected = completion.num_tokens if self.has_token_logps else 0
                if len(score.token_logps) != expected:
                    found = f"found {len(score.token_logps)} log-probs for {completion.num_tokens} tokens"
                    raise CorruptShardError(f"{place}: row {scored.pair.row}: expected {expected}, {found}. {REMEDY}")

    def _open_part(self, name: str, place: str) -> Any:
        if name not in self._checked:
            check_content(self._folder.read(f"{self._place}/{name}"), name, place)
            file = open_parquet(self._folder.open_parquet(f"{self._place}/{name}"), PAIR_SCHEMA, place)
            promised = next(part["rows"] for part in self.manifest["parts"] if part["file"] == name)
            if file.metadata.num_rows != promised:
                raise CorruptShardError(f"{place}: the manifest promises {promised} pairs, found {file.metadata.num_rows}. {REMEDY}")
            self._checked[name] = file
        return self._checked[name]


class PairSetWriter:
    """Publishes a pair set part by part; nothing is visible before `finish`."""

    def __init__(self, folder: Folder, place: str):
        self._folder, self._place = folder, place
        self._waiting: list[ScoredPair] = []
        self._parts: list[Document] = []
        self.bytes_written = 0

    def add(self, pairs: Sequence[ScoredPair]) -> None:
        """Append pairs; full parts are written out."""
        self._waiting.extend(pairs)
        while len(self._waiting) >= PART_PAIRS:
            self._write_part(self._waiting[:PART_PAIRS])
            del self._waiting[:PART_PAIRS]

    def finish(self, details: Document) -> Document:
        """Publish the last part, then the manifest with these details. Returns the manifest."""
        if self._waiting:
            self._write_part(self._waiting)
            self._waiting = []
        manifest = {
            **details,
            "format": "dpo-cache pairs",
            "num_pairs": sum(part["rows"] for part in self._parts),
            "parts": self._parts,
        }
        content = seal_document(manifest)
        self._folder.publish(f"{self._place}/manifest.json", content)
        self.bytes_written += len(content)
        return manifest

    def _write_part(self, pairs: Sequence[ScoredPair]) -> None:
        content = _encode_pairs(pairs)
        name = name_by_content(content)
        if not self._folder.exists(f"{self._place}/{name}"):
            self._folder.publish(f"{self._place}/{name}", content)
            self.bytes_written += len(content)
        self._parts.append({"file": name, "rows": len(pairs), "bytes": len(content)})


class PairsDigest:
    """Hex sha256 over the rows and completion keys of a pair set, in order: the same pairs, the same digest."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"dpo-cache pairs/1")

    def add(self, row: int, chosen_key: bytes, rejected_key: bytes) -> None:
        self._digest.update(struct.pack("<q", row) + chosen_key + rejected_key)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def read_manifest(folder: Folder, place: str) -> Document:
    """The manifest of a pair set, checked."""
    name = f"{place}/manifest.json"
    manifest = open_sealed(folder.read(name), f"{folder}/{name}")
    parts_rows = sum(part["rows"] for part in manifest["parts"])
    if parts_rows != manifest["num_pairs"]:
        raise CorruptShardError(f"{folder}/{name}: {manifest['num_pairs']} pairs promised, {parts_rows} in its parts.")
    return manifest


def _encode_pairs(pairs: Sequence[ScoredPair]) -> bytes:
    sides = [(scored.pair.chosen, scored.pair.rejected) for scored in pairs]
    columns = {
        "row": pa.array([scored.pair.row for scored in pairs], pa.int64()),
        "prompt_ids": list_array([chosen.prompt_ids for chosen, _ in sides], TOKEN_LIST),
        "rejected_prompt_ids": pa.array([_own_prompt(chosen, rejected) for chosen, rejected in sides], TOKEN_LIST),
        "chosen_ids": list_array([chosen.completion_ids for chosen, _ in sides], TOKEN_LIST),
        "rejected_ids": list_array([rejected.completion_ids for _, rejected in sides], TOKEN_LIST),
        "chosen_key": key_column([completion_key(chosen) for chosen, _ in sides]),
        "rejected_key": key_column([completion_key(rejected) for _, rejected in sides]),
        "chosen_num_tokens": pa.array([chosen.num_tokens for chosen, _ in sides], pa.uint32()),
        "rejected_num_tokens": pa.array([rejected.num_tokens for _, rejected in sides], pa.uint32()),
        "ref_chosen_logps": pa.array([scored.ref_chosen.logps for scored in pairs], pa.float64()),
        "ref_rejected_logps": pa.array([scored.ref_rejected.logps for scored in pairs], pa.float64()),
        "ref_chosen_token_logps": list_array([scored.ref_chosen.token_logps for scored in pairs], FLOAT_LIST),
        "ref_rejected_token_logps": list_array([scored.ref_rejected.token_logps for scored in pairs], FLOAT_LIST),
    }
    table = pa.table([columns[name] for name in PAIR_SCHEMA.names], schema=PAIR_SCHEMA)
    return write_parquet(table, row_group_size=ROW_GROUP_PAIRS)


def _own_prompt(chosen: Completion, rejected: Completion) -> np.ndarray | None:
    return None if np.array_equal(chosen.prompt_ids, rejected.prompt_ids) else rejected.prompt_ids


def _decode_pairs(table: pa.Table) -> list[ScoredPair]:
    lists = {
        name: split_lists(table.column(name))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_token_logps", "ref_rejected_token_logps")
    }
    own_prompts = table.column("rejected_prompt_ids").to_pylist()
    pairs = []
    for index, row in enumerate(table.column("row").to_pylist()):
        prompt, own = lists["prompt_ids"][index], own_prompts[index]
        rejected_prompt = prompt if own is None else np.array(own, np.uint32)
        pair = Pair(
            row,
            chosen=Completion(prompt, lists["chosen_ids"][index]),
            rejected=Completion(rejected_prompt, lists["rejected_ids"][index]),
        )
        chosen, rejected = lists["ref_chosen_token_logps"][index], lists["ref_rejected_token_logps"][index]
        pairs.append(ScoredPair(pair, Score(chosen), Score(rejected)))
    return pairs


def _with_sums_alone(table: pa.Table, pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    """The pairs with the sums that were imported, which nothing else in the file adds up to."""
    sums = zip(table.column("ref_chosen_logps").to_pylist(), table.column("ref_rejected_logps").to_pylist(), strict=True)
    return [
        ScoredPair(scored.pair, Score(scored.ref_chosen.token_logps, chosen), Score(scored.ref_rejected.token_logps, rejected))
        for scored, (chosen, rejected) in zip(pairs, sums, strict=True)
    ]
