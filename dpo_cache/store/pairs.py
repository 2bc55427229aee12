"""Pair sets: tokenized pairs joined with one reference's log-probs. `format/pair_tables.py` specifies their
files.
"""

from __future__ import annotations

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import SupportsIndex, overload

import numpy as np
import pyarrow as pa

from dpo_cache.errors import CorruptShardError, MissingFileError, StorageError
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document, seal_document
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.store.format.model_limits import ModelLimits
from dpo_cache.store.format.pair_tables import (
    MANIFEST_FORMAT,
    PAIR_SCHEMA,
    check_pairs,
    decode_pairs,
    pair_table,
)
from dpo_cache.store.format.parquet import (
    REMEDY,
    ParquetReader,
    ParquetReaders,
    name_by_content,
    write_parquet,
)
from dpo_cache.store.format.shards import keys_of
from dpo_cache.store.own_documents import note_own
from dpo_cache.store.parts import KeptParts, has_part, holds_part
from dpo_cache.types import ScoredPair, split_lists

ROW_GROUP_PAIRS = 256  # the unit that is read, and shuffled, at once
PART_PAIRS = 8192
BLOCK_TOKENS = 8 * 2**20  # a part ends where the tokens of its last block reach this: some 64 MB in memory
ATTEMPTS = 5  # to publish what other processes remove


class PairSet:
    """An open pair set, in the order of the data set. Iterating streams it from disk.

        for scored in pair_set:
            scored.pair.chosen.completion_ids, scored.ref_chosen.logps

    `pair_set[i]` is one `ScoredPair` and a slice is a list of them; negative indices count from the end. Only
    the blocks of 256 pairs that hold them are read, and the last one is kept, so neighbours cost nothing.
    """

    def __init__(self, folder: Folder, place: str, manifest: Document):
        self._folder, self._place, self.manifest = folder, place, manifest
        self._readers = ParquetReaders(folder, place, PAIR_SCHEMA)
        self._blocks = [
            (part, group, min(ROW_GROUP_PAIRS, part["rows"] - group * ROW_GROUP_PAIRS))
            for part in manifest["parts"]
            for group in range(-(-part["rows"] // ROW_GROUP_PAIRS))
        ]
        self._last_block: tuple[int, list[ScoredPair]] | None = None  # the block that indexing read last
        self._limits: ModelLimits | None = None

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
        """Return whether the log-probs were made elsewhere and brought in by `dpo-cache import`."""
        return self.manifest.get("imported", False)

    @property
    def has_token_logps(self) -> bool:
        """Return whether there is a log-prob for each token; False where only sums were imported."""
        return self.manifest.get("token_logps", True)

    def __repr__(self) -> str:
        return f"<PairSet {self.name}: {len(self):,} pairs, reference {self.reference_id[:12]}>"

    def _repr_html_(self) -> str:
        from dpo_cache.store.html import pair_set_html  # which imports this module

        return pair_set_html(self, self._folder)

    def __len__(self) -> int:
        return self.manifest["num_pairs"]

    @overload
    def __getitem__(self, index: SupportsIndex) -> ScoredPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScoredPair]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> ScoredPair | list[ScoredPair]:
        if isinstance(index, slice):
            return self._read_rows(range(len(self))[index])
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"pair {place} of {self.name}, which has {len(self)} pairs")
        return self._read_rows([place % len(self)])[0]

    def __iter__(self) -> Iterator[ScoredPair]:
        for block in range(len(self._blocks)):
            yield from self.read_block(block)

    @property
    def block_sizes(self) -> list[int]:
        """Pairs in each block; blocks are the units that can be read in any order."""
        return [num_pairs for _, _, num_pairs in self._blocks]

    def is_complete(self) -> bool:
        """Return whether every part that the manifest names is there and readable, as it was written.

        Of a cache on a disk every byte is read; of a remote one the sizes are compared.
        """
        return all(holds_part(self._folder, self._place, part) for part in self.manifest["parts"])

    def has_parts(self) -> bool:
        """Return whether every part that the manifest names is there, of the size that it should have."""
        return all(has_part(self._folder, self._place, part) for part in self.manifest["parts"])

    def keep_open(self) -> None:
        """Keep the set readable to the end, whatever is published, removed or collected meanwhile.

        Opens every part now: an open file outlives its name. On NFS that holds for removals by the same
        machine. Raises `StorageError` where a part is gone already, or where the system lets no more files be
        opened.
        """
        self._readers.keep_open([part["file"] for part in self.manifest["parts"]])

    def limit_to(self, limits: ModelLimits) -> None:
        """From now on, reading a pair that the model cannot read raises `ModelError`."""
        self._limits, self._last_block = limits, None

    def read_block(self, block: int) -> list[ScoredPair]:
        """The pairs of one block. A part's digest is checked when it is first read."""
        part, group, num_pairs = self._blocks[block]
        reader = self._open_part(part)
        table = reader.read_group(group)
        if table.num_rows != num_pairs:
            raise CorruptShardError(
                f"{reader.place}: expected {num_pairs} pairs in row group {group}, found "
                f"{table.num_rows}. {REMEDY}"
            )
        check_pairs(table, reader.place, has_token_logps=self.has_token_logps)
        if self._limits is not None:
            self._limits.check(table, reader.place)
        return decode_pairs(table, has_token_logps=self.has_token_logps)

    def read_keys(self) -> Iterator[tuple[bytes, bytes]]:
        """The keys of each pair's chosen and rejected completion, in order."""
        for part, group, _ in self._blocks:
            columns = self._open_part(part).read_group(group, ["chosen_key", "rejected_key"]).columns
            yield from zip(*(key_bytes(keys_of(column)) for column in columns), strict=True)

    def read_prompts(self) -> Iterator[np.ndarray]:
        """The token ids of each pair's prompt, uint32, in order."""
        for part, group, _ in self._blocks:
            yield from split_lists(self._open_part(part).read_group(group, ["prompt_ids"]).column(0))

    def values_digest(self, *, with_tokens: bool = False) -> str:
        """Hex sha256 over the reference's sums of all pairs, in order; `with_tokens`, also over the log-probs
        of the tokens. The same values have the same digest, however they are divided into parts.
        """
        names = ["ref_chosen_logps", "ref_rejected_logps"]
        names += ["ref_chosen_token_logps", "ref_rejected_token_logps"] if with_tokens else []
        digests = [hashlib.sha256() for _ in names]
        for part, group, _ in self._blocks:
            table = self._open_part(part).read_group(group, names)
            for digest, name in zip(digests, names, strict=True):
                for chunk in table.column(name).chunks:
                    values = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
                    digest.update(values.to_numpy().tobytes())
        return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

    def _read_rows(self, rows: Sequence[int]) -> list[ScoredPair]:
        """The pairs at these positions; each run of positions in one block reads the block once."""
        ends = list(accumulate(self.block_sizes))
        found = []
        for row in rows:
            block = bisect_right(ends, row)
            if self._last_block is None or self._last_block[0] != block:
                self._last_block = block, self.read_block(block)
            found.append(self._last_block[1][row - ends[block]])
        return found

    def _open_part(self, part: Document) -> ParquetReader:
        reader = self._readers.open(part["file"])
        if reader.footer.num_rows != part["rows"]:
            raise CorruptShardError(
                f"{reader.place}: the manifest promises {part['rows']} pairs, found "
                f"{reader.footer.num_rows}. {REMEDY}"
            )
        return reader


class PairSetWriter:
    """Publishes a pair set part by part; nothing is visible before `finish`.

    Other processes may remove a part before the manifest names it: `gc` takes leftovers of earlier writers,
    and this one may reuse them. So the bytes of all parts are kept until `finish` has found each in its
    place.
    """

    def __init__(self, folder: Folder, place: str):
        self._folder, self._place = folder, place
        self._waiting: list[ScoredPair] = []
        self._block_tokens = 0  # tokens of the waiting pairs in the last row group
        self._parts: list[Document] = []
        self._kept = KeptParts()
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
        """Publish the last part, then the manifest with these details, then parts that other processes have
        removed meanwhile. Returns the manifest.

        A process that removes a part hides it first and then searches for a manifest that names it; here the
        manifest is published first. So one of the two notices the other. Raises `StorageError` if a removed
        part was not kept, because no temporary file could be written; then the manifest is removed, too.
        """
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
        note_own(manifest)
        self.bytes_written += len(content)
        self._publish_removed_parts(content)
        self._kept.close()
        return manifest

    def add_part(self, table: pa.Table) -> None:
        """Publish rows of `PAIR_SCHEMA`, at most `PART_PAIRS` of them, as one part."""
        content = write_parquet(table, row_group_size=ROW_GROUP_PAIRS)
        part: Document = {"file": name_by_content(content), "rows": len(table), "bytes": len(content)}
        if not holds_part(self._folder, self._place, part):
            self._folder.publish(f"{self._place}/{part['file']}", content)
            self.bytes_written += len(content)
        self._kept.add(part["file"], content)
        self._parts.append(part)

    def _write_part(self) -> None:
        self.add_part(pair_table(self._waiting))
        self._waiting = []

    def _publish_removed_parts(self, manifest: bytes) -> None:
        for _ in range(ATTEMPTS):
            removed = [part["file"] for part in self._parts if not has_part(self._folder, self._place, part)]
            if not removed or not self._is_published(manifest):
                return
            if not all(file in self._kept for file in removed):
                break
            for file in removed:
                self._folder.publish(f"{self._place}/{file}", self._kept.read(file))
        self._folder.remove(f"{self._place}/manifest.json")
        raise StorageError(
            f"{self._folder}/{self._place}: other processes removed parts while the pair set was written, "
            f"such as {removed[0]}.\nNo pair set of this name is left: run the same command again."
        )

    def _is_published(self, manifest: bytes) -> bool:
        """Return whether the manifest is still this writer's: it may be removed, or replaced by another
        writer's.
        """
        try:
            return self._folder.read(f"{self._place}/manifest.json") == manifest
        except MissingFileError:
            return False
