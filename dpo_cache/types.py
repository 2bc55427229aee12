"""The plain values that the rooms hand to each other: token ids and log-probs in numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

TokenIds = np.ndarray  # uint32 [num_tokens]

# Largest and mean gap in nats per token that rounding explains between two ways to compute one log-prob, by
# dtype of the forward
# pass: about ten times what ten tiny models show (docs/measurements.md), for a real model is deeper. A wrong
# mask gives whole nats.
TOKEN_TOLERANCES = {"float32": (1e-3, 1e-4), "float16": (0.1, 0.01), "bfloat16": (0.5, 0.05)}

# What `--quantize` makes of weights, as a reference's identity says it. The dtype that 4-bit weights are
# computed in is the identity's dtype.
# 8-bit: threshold 0, or which columns are kept in 16 bits, and with them the log-prob of a token, depends on
# the tokens after and beside it.
QUANTIZATION_FIELDS: dict[str, dict[str, Any]] = {
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
    "4bit": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


def quantization_name(identity: dict[str, Any]) -> str:
    """The `--quantize` of a reference with this identity; `none` also for a checkpoint that was itself saved
    quantized.
    """
    return next(
        (name for name, fields in QUANTIZATION_FIELDS.items() if identity.get("quantization") == fields),
        "none",
    )


@dataclass(frozen=True, eq=False)
class Completion:
    """One response under one prompt: the unit that is scored and stored.

    Both arrays are uint32 and not empty: the first completion token needs a token that predicts it.
    """

    prompt_ids: TokenIds
    completion_ids: TokenIds

    def __len__(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_tokens(self) -> int:
        """Completion tokens, the prompt not counted."""
        return len(self.completion_ids)

    @property
    def sequence_ids(self) -> TokenIds:
        """Prompt and completion as the model reads them."""
        return np.concatenate([self.prompt_ids, self.completion_ids])


@dataclass(frozen=True, eq=False)
class Pair:
    """A chosen and a rejected completion, and the row of the data set they came from.

    Their prompts are the same, except where `keep-end` truncation left each a different part.
    """

    row: int
    chosen: Completion
    rejected: Completion


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probs of one completion: natural log, float32 `[num_tokens]`.

    An imported score may be a sum alone: then `token_logps` is empty and `imported_sum` is that sum.
    """

    token_logps: np.ndarray
    imported_sum: float | None = None

    @cached_property
    def logps(self) -> float:
        """Sum over the completion's tokens, in nats, accumulated in float64."""
        return (
            float(self.token_logps.sum(dtype=np.float64)) if self.imported_sum is None else self.imported_sum
        )


@dataclass(frozen=True, eq=False)
class ScoredPair:
    """A pair joined with the reference's log-probs, ready to train on."""

    pair: Pair
    ref_chosen: Score
    ref_rejected: Score


def split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One numpy array a row of an Arrow list column, views of its buffer."""
    rows: list[np.ndarray] = []
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)
        rows.extend(values[start:end] for start, end in pairwise(offsets.tolist()))
    return rows
