"""Files of a cache with the values that a merge prefers, in place of others of the same completions."""

from __future__ import annotations

from collections.abc import Mapping

from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.keys import completion_key, key_bytes
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA, check_pairs, decode_pairs, pair_table
from dpo_cache.store.format.parquet import ParquetBuilder, open_verified
from dpo_cache.store.format.shards import encode_shard, keys_of, read_shard
from dpo_cache.store.upkeep.disagreements import Preferred
from dpo_cache.types import Completion, Score, ScoredPair, split_lists


def rewrite_shard(folder: Folder, file: str, preferred: Mapping[bytes, Preferred]) -> bytes | None:
    """The shard with the preferred values, without those that another shard holds; None if nothing is
    left.
    """
    scores = []
    for table in read_shard(folder, file):
        values = split_lists(table.column("token_logps"))
        for key, token_logps in zip(key_bytes(keys_of(table.column("key"))), values, strict=True):
            other = preferred.get(key)
            if other is None or not other.in_shard:
                scores.append((key, other.score if other else Score(token_logps)))
    return encode_shard(scores) if scores else None


def rewrite_part(folder: Folder, file: str, preferred: Mapping[bytes, Preferred]) -> bytes:
    """The part of a pair set with the preferred values."""

    def choose(completion: Completion, score: Score) -> Score:
        other = preferred.get(completion_key(completion))
        return other.score if other else score

    builder = ParquetBuilder(PAIR_SCHEMA)
    with open_verified(folder, file, PAIR_SCHEMA) as reader:
        for table in reader.read_groups():
            check_pairs(table, reader.place)
            builder.add(
                pair_table(
                    [
                        ScoredPair(
                            scored.pair,
                            choose(scored.pair.chosen, scored.ref_chosen),
                            choose(scored.pair.rejected, scored.ref_rejected),
                        )
                        for scored in decode_pairs(table)
                    ]
                )
            )
    return builder.finish()
