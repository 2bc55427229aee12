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
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.documents import Document, read_sealed, seal_document
from dpo_cache.store.files import Folder
from dpo_cache.store.keys import completion_key, key_bytes
from dpo_cache.store.parquet import REMEDY, ParquetReader, ParquetReaders, name_by_content, write_parquet
from dpo_cache.store.parts import is_part_name
from dpo_cache.store.shards import FLOAT_LIST, KEY, TOKEN_LIST, are_sums_alone, key_column, keys_of, list_array, list_lengths, lists_agree
from dpo_cache.types import Completion, Pair, Score, ScoredPair, split_lists

ROW_GROUP_PAIRS = 256  # the unit that is read, and shuffled, at once
PART_PAIRS = 8192
BLOCK_TOKENS = 8 * 2**20  # a part ends where the tokens of its last block reach this: some 64 MB in memory
MOST_PART_PAIRS = 8192
MANIFEST_FORMAT = "dpo-cache pairs"
OPTIONAL = {"source": dict, "tokenization": dict, "pairs_digest": str, "imported": bool, "token_logps": bool}  # members, and their kinds

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
        self._readers = ParquetReaders(folder, place, PAIR_SCHEMA)
        self._blocks = [
            (part, group, min(ROW_GROUP_PAIRS, part["rows"] - group * ROW_GROUP_PAIRS))
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

    def hold(self) -> None:
        """Keep the set readable to the end, whatever is published, removed or collected meanwhile.

        Opens every part now: an open file outlives its name. On NFS that holds for removals by the same machine.
        Raises `StorageError` where a part is gone already, or where the system lets no more files be opened.
        """
        self._readers.hold([part["file"] for part in self.manifest["parts"]])

    def read_block(self, block: int) -> list[ScoredPair]:
        """The pairs of one block. A part's digest is checked when it is first read."""
        part, group, num_pairs = self._blocks[block]
        reader = self._open_part(part)
        table = reader.read_group(group)
        if table.num_rows != num_pairs:
            raise CorruptShardError(f"{reader.place}: expected {num_pairs} pairs in row group {group}, found {table.num_rows}. {REMEDY}")
        check_pairs(table, reader.place, has_token_logps=self.has_token_logps)
        return _decode_pairs(table) if self.has_token_logps else _with_sums_alone(table, _decode_pairs(table))

    def read_keys(self) -> Iterator[tuple[bytes, bytes]]:
        """The keys of each pair's chosen and rejected completion, in order."""
        for part, group, _ in self._blocks:
            table = self._open_part(part).read_group(group, ["chosen_key", "rejected_key"])
            yield from zip(key_bytes(keys_of(table.column("chosen_key"))), key_bytes(keys_of(table.column("rejected_key"))), strict=True)

    def _open_part(self, part: Document) -> ParquetReader:
        reader = self._readers.open(part["file"])
        if reader.num_rows != part["rows"]:
            raise CorruptShardError(f"{reader.place}: the manifest promises {part['rows']} pairs, found {reader.num_rows}. {REMEDY}")
        return reader


class PairSetWriter:
    """Publishes a pair set part by part; nothing is visible before `finish`."""

    def __init__(self, folder: Folder, place: str):
        self._folder, self._place = folder, place
        self._waiting: list[ScoredPair] = []
        self._block_tokens = 0  # of the waiting pairs that will stand in the last row group
        self._parts: list[Document] = []
        self.bytes_written = 0

    def add(self, pairs: Sequence[ScoredPair]) -> None:
        """Append pairs; full parts are written out, and a part ends early where its pairs are very long."""
        for scored in pairs:
            if len(self._waiting) % ROW_GROUP_PAIRS == 0:
                self._block_tokens = 0
            self._waiting.append(scored)
            self._block_tokens += len(scored.pair.chosen) + len(scored.pair.rejected)
            if len(self._waiting) >= PART_PAIRS or self._block_tokens >= BLOCK_TOKENS:
                self._write_part()

    def finish(self, details: Document) -> Document:
        """Publish the last part, then the manifest with these details. Returns the manifest."""
        if self._waiting:
            self._write_part()
        manifest = {
            **details,
            "format": MANIFEST_FORMAT,
            "num_pairs": sum(part["rows"] for part in self._parts),
            "parts": self._parts,
        }
        content = seal_document(manifest)
        self._folder.publish(f"{self._place}/manifest.json", content)
        self.bytes_written += len(content)
        return manifest

    def add_part(self, table: pa.Table) -> None:
        """Publish rows of `PAIR_SCHEMA`, at most `PART_PAIRS` of them, as one part."""
        content = write_parquet(table, row_group_size=ROW_GROUP_PAIRS)
        name = name_by_content(content)
        if not self._folder.exists(f"{self._place}/{name}"):
            self._folder.publish(f"{self._place}/{name}", content)
            self.bytes_written += len(content)
        self._parts.append({"file": name, "rows": len(table), "bytes": len(content)})

    def _write_part(self) -> None:
        self.add_part(_pair_table(self._waiting))
        self._waiting = []


class PairsDigest:
    """Hex sha256 over the rows and completion keys of a pair set, in order: the same pairs, the same digest."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256(b"dpo-cache pairs/1")

    def add(self, row: int, chosen_key: bytes, rejected_key: bytes) -> None:
        self._digest.update(struct.pack("<q", row) + chosen_key + rejected_key)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def read_manifest(folder: Folder, place: str) -> Document:
    """The manifest of a pair set, checked: what it names are files of its own folder, of sizes that a pair set may have."""
    name = f"{place}/manifest.json"
    manifest = read_sealed(folder, name)
    problem = _manifest_problem(manifest, place)
    if problem:
        raise CorruptShardError(f"{folder}/{name}: {problem}")
    return manifest


def check_pairs(table: pa.Table, place: str, *, has_token_logps: bool = True) -> None:
    """Raise `CorruptShardError` unless the columns of a pair set agree with each other, and all values are as specified."""
    for batch in table.to_batches():
        if not _columns_agree(batch, has_token_logps):
            raise CorruptShardError(f"{place}: its columns disagree with each other, or are no numbers. {REMEDY}")


def _manifest_problem(manifest: Document, place: str) -> str | None:
    """What is wrong with a manifest, if anything."""
    parts = manifest.get("parts")
    if manifest.get("format") != MANIFEST_FORMAT or not isinstance(parts, list) or not all(map(_is_part, parts)):
        return f"expected the manifest of a {MANIFEST_FORMAT!r} with parts of at most {MOST_PART_PAIRS} pairs."
    if f"pairs/{manifest.get('name')}/{manifest.get('split')}" != place:
        return f"it belongs to {str(manifest.get('name'))[:128]!r}, {str(manifest.get('split'))[:128]!r}."
    if not isinstance(manifest.get("reference"), str) or not re.fullmatch("[0-9a-f]{64}", manifest["reference"]):
        return "its reference is no sha256."
    if wrong := [name for name, kind in OPTIONAL.items() if not isinstance(manifest.get(name, kind()), kind)]:
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
    return is_named and all(type(number) is int and number > 0 for number in numbers) and part["rows"] <= MOST_PART_PAIRS


def _columns_agree(batch: pa.RecordBatch, has_token_logps: bool) -> bool:
    for side in ("chosen", "rejected"):
        num_tokens = batch.column(f"{side}_num_tokens")
        token_logps, logps = batch.column(f"ref_{side}_token_logps"), batch.column(f"ref_{side}_logps")
        if not (lists_agree(token_logps, num_tokens, logps) if has_token_logps else are_sums_alone(token_logps, num_tokens, logps)):
            return False
        if (list_lengths(batch.column(f"{side}_ids")) != num_tokens.to_numpy()).any():
            return False
    own = batch.column("rejected_prompt_ids")
    has_own = own.is_valid().to_numpy(zero_copy_only=False)
    no_prompt = (list_lengths(batch.column("prompt_ids")) == 0) | (has_own & (list_lengths(own) == 0))
    return not no_prompt.any() and bool((batch.column("row").to_numpy() >= 0).all())


def _pair_table(pairs: Sequence[ScoredPair]) -> pa.Table:
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
    return pa.table([columns[name] for name in PAIR_SCHEMA.names], schema=PAIR_SCHEMA)


def _own_prompt(chosen: Completion, rejected: Completion) -> np.ndarray | None:
    return None if np.array_equal(chosen.prompt_ids, rejected.prompt_ids) else rejected.prompt_ids


def _decode_pairs(table: pa.Table) -> list[ScoredPair]:
    """One object a row; their arrays are views of the table's memory."""
    rows = table.column("row").to_pylist()
    prompts, chosen_ids, rejected_ids, chosen_logps, rejected_logps = (
        split_lists(table.column(name)) for name in ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_token_logps", "ref_rejected_token_logps")
    )
    own = table.column("rejected_prompt_ids")
    if own.null_count == len(own):
        rejected_prompts = prompts
    else:
        has_own = own.is_valid().to_pylist()
        rejected_prompts = [mine if has else shared for mine, has, shared in zip(split_lists(own), has_own, prompts, strict=True)]
    return [
        ScoredPair(Pair(row, Completion(prompt, chosen), Completion(rejected_prompt, rejected)), Score(ref_chosen), Score(ref_rejected))
        for row, prompt, rejected_prompt, chosen, rejected, ref_chosen, ref_rejected in zip(
            rows, prompts, rejected_prompts, chosen_ids, rejected_ids, chosen_logps, rejected_logps, strict=True
        )
    ]


def _with_sums_alone(table: pa.Table, pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    """The pairs with the sums that were imported, which nothing else in the file adds up to."""
    sums = zip(table.column("ref_chosen_logps").to_pylist(), table.column("ref_rejected_logps").to_pylist(), strict=True)
    return [
        ScoredPair(scored.pair, Score(scored.ref_chosen.token_logps, chosen), Score(scored.ref_rejected.token_logps, rejected))
        for scored, (chosen, rejected) in zip(pairs, sums, strict=True)
    ]
