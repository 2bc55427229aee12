"""The limits of a model for a pair set: token ids that it has embeddings for, and rows of a length it was
made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo_cache.errors import ModelError
from dpo_cache.store.format.pair_tables import SIDES, decode_completions
from dpo_cache.store.format.shards import list_lengths

ID_COLUMNS = ("prompt_ids", "rejected_prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class ModelLimits:
    """The limits of a model: it has embeddings for the token ids below `vocab_size`, and was made for rows of
    at most `positions` tokens, None for any.
    """

    model: str
    vocab_size: int
    positions: int | None = None

    def check(self, table: pa.Table, place: str) -> None:
        """Raise `ModelError` naming the first pair of a part's rows that the model cannot read."""
        for batch in table.to_batches():
            if self._may_exceed(batch):
                self._check_each(pa.Table.from_batches([batch]), place)

    def _may_exceed(self, batch: pa.RecordBatch) -> bool:
        columns = [batch.column(name) for name in ID_COLUMNS]
        largest = max(
            (int(ids.max()) for ids in (column.values.to_numpy() for column in columns) if len(ids)),
            default=0,
        )
        prompts, own, chosen, rejected = map(list_lengths, columns)
        longest = int((np.maximum(prompts, own) + np.maximum(chosen, rejected)).max(initial=0))
        return largest >= self.vocab_size or (self.positions is not None and longest > self.positions)

    def _check_each(self, table: pa.Table, place: str) -> None:
        sides = zip(*(decode_completions(table, side) for side in SIDES), strict=True)
        for row, pair in zip(table.column("row").to_pylist(), sides, strict=True):
            largest = max(int(completion.sequence_ids.max()) for completion in pair)
            if largest >= self.vocab_size:
                raise ModelError(
                    f"{place}: row {row} of the data holds token id {largest}, but {self.model} has "
                    f"{self.vocab_size} embeddings: it reads other tokens.\n"
                    "Name a model with the tokenizer of the pairs with `model`, or score the data with "
                    "`dpo-cache precompute` for this one."
                )
            longest = max(map(len, pair))
            if self.positions is not None and longest > self.positions:
                raise ModelError(
                    f"{place}: row {row} of the data has a sequence of {longest} tokens, but {self.model} "
                    f"was made for {self.positions} at most.\n"
                    f"Score the data with `dpo-cache precompute --max-length {self.positions}`, and use that "
                    "pair set."
                )
