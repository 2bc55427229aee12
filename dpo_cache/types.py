"""The plain values that the packages exchange: token ids and log-probs in numpy arrays."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

TokenIds = np.ndarray  # uint32 [num_tokens]

# Bounds of a token's log-prob in nats; what is outside of them is no log-prob. Logits in half precision reach
# 65,504, so no model that works gets near the lower one. Rounding takes values above 0, but never by so much.
LOWEST_LOGP, HIGHEST_LOGP = -1e6, 1.0

# Largest and mean gap in nats per token that rounding explains between two ways to compute one log-prob, by
# dtype of the forward pass: about ten times the gaps of ten tiny models (docs/measurements.md), as a real
# model is deeper. A wrong mask gives gaps of whole nats.
TOKEN_TOLERANCES = {"float32": (1e-3, 1e-4), "float16": (0.1, 0.01), "bfloat16": (0.5, 0.05)}

# Root mean square of the gaps of many tokens that rounding explains, as a share of the spread S (standard
# deviation, in nats) of their log-probs: the first number, and the second times the lesser of S and 1. Gaps
# by rounding and by noise on the weights both grow with S, so a limit in nats cannot tell them apart in every
# model. docs/measurements.md has the figures.
SPREAD_TOLERANCES = {"bfloat16": (0.02, 0.025), "float16": (0.0025, 0.0035)}
LEAST_TOKENS = 64  # for these shares to be known well enough

UNKNOWN_DTYPE = "bfloat16"  # of an imported reference that names none: the coarsest

# How `quantize` changes weights, as fields of a reference's identity. 4-bit weights are multiplied in the
# identity's dtype. With 8 bits the threshold is 0: otherwise the columns that are kept in 16 bits, and with
# them the log-prob of a token, would depend on the other tokens of the batch.
QUANTIZATION_FIELDS: dict[str, dict[str, Any]] = {
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
    "4bit": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
}


def token_rounding(*dtypes: str | None) -> float:
    """The mean gap of a token's log-prob, in nats, that rounding in the coarsest of the dtypes explains."""
    return max(
        TOKEN_TOLERANCES.get(dtype or UNKNOWN_DTYPE, TOKEN_TOLERANCES[UNKNOWN_DTYPE])[1] for dtype in dtypes
    )


def quantization_name(identity: dict[str, Any]) -> str:
    """The `quantize` value of a reference with this identity; also `none` for a checkpoint that was saved
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

    def __repr__(self) -> str:
        return f"<Completion: {self.num_tokens} tokens after a prompt of {len(self.prompt_ids)}>"

    @property
    def num_tokens(self) -> int:
        """Number of completion tokens; the prompt does not count."""
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

    def __repr__(self) -> str:
        return (
            f"<Pair of row {self.row}: {self.chosen.num_tokens} chosen and {self.rejected.num_tokens} "
            f"rejected tokens after a prompt of {len(self.chosen.prompt_ids)}>"
        )


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probs of one completion: natural log, float32 `[num_tokens]`.

    An imported score may be only a sum: then `token_logps` is empty and `imported_sum` is that sum.
    """

    token_logps: np.ndarray
    imported_sum: float | None = None

    @cached_property
    def logps(self) -> float:
        """Sum over the completion's tokens, in nats, accumulated in float64."""
        return (
            float(self.token_logps.sum(dtype=np.float64)) if self.imported_sum is None else self.imported_sum
        )

    def __repr__(self) -> str:
        tokens = f"{len(self.token_logps)} tokens" if self.imported_sum is None else "an imported sum"
        return f"<Score: {self.logps:.4f} nats, {tokens}>"


@dataclass
class GapSums:
    """Sums over tokens whose log-probs were computed in two ways; gaps and log-probs in nats."""

    tokens: int = 0
    gaps: float = 0.0  # signed
    squared_gaps: float = 0.0
    logps: float = 0.0
    squared_logps: float = 0.0

    def add(self, gaps_N: np.ndarray, logps_N: np.ndarray) -> None:
        """Add the gaps of tokens, and their log-probs by one of the ways."""
        gaps_N, logps_N = gaps_N.astype(np.float64), logps_N.astype(np.float64)
        self.tokens += len(gaps_N)
        self.gaps += float(gaps_N.sum())
        self.squared_gaps += float((gaps_N**2).sum())
        self.logps += float(logps_N.sum())
        self.squared_logps += float((logps_N**2).sum())

    def plus(self, other: GapSums) -> GapSums:
        """Both together."""
        return GapSums(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def problem(self, dtype: str) -> str:
        """How the gaps are larger than rounding in the dtype explains; empty if they are not, or too few.

        Their root mean square is at most a share of the spread of the log-probs, A nats. Their mean is at
        most `5 A / sqrt(tokens) + A^2`: chance, and the bias that rounding has because noise in logits raises
        the sum over the vocabulary.
        """
        if dtype not in SPREAD_TOLERANCES or self.tokens < LEAST_TOKENS:
            return ""
        mean, mean_logp = self.gaps / self.tokens, self.logps / self.tokens
        root = (self.squared_gaps / self.tokens) ** 0.5
        spread = max(self.squared_logps / self.tokens - mean_logp**2, 0.0) ** 0.5
        share, more = SPREAD_TOLERANCES[dtype]
        allowed = spread * (share + more * min(spread, 1.0))
        if not root <= allowed:  # NaN is a problem
            return f"{root:.2g} nats (root mean square), where rounding in {dtype} explains {allowed:.2g}"
        allowed = 5 * allowed / self.tokens**0.5 + allowed**2
        if abs(mean) > allowed:
            return f"{mean:+.2g} nats on average, where rounding in {dtype} explains {allowed:.2g}"
        return ""


@dataclass(frozen=True, eq=False)
class ScoredPair:
    """A pair joined with the reference's log-probs, ready to train on."""

    pair: Pair
    ref_chosen: Score
    ref_rejected: Score

    def __repr__(self) -> str:
        return (
            f"<ScoredPair of row {self.pair.row}: chosen {self.pair.chosen.num_tokens} tokens, "
            f"{self.ref_chosen.logps:.4f} nats; rejected {self.pair.rejected.num_tokens} tokens, "
            f"{self.ref_rejected.logps:.4f} nats>"
        )


def split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One numpy array for each row of an Arrow list column: views of its buffer."""
    rows: list[np.ndarray] = []
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=False)
        rows.extend(values[start:end] for start, end in pairwise(offsets.tolist()))
    return rows


def are_logps(values: np.ndarray, num_tokens: np.ndarray | int = 1) -> bool:
    """Return whether all values are log-probs of a token, or sums of those of `num_tokens`: neither NaN nor
    infinite, and within the bounds above.
    """
    return bool(((values >= LOWEST_LOGP * num_tokens) & (values <= HIGHEST_LOGP * num_tokens)).all())
