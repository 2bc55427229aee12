"""The lengths of the rows of pair sets, and the tokens of a run over them, for the self-check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedConfig

from dpo_cache.lm.config_limits import limits_of, rope_limit
from dpo_cache.lm.positions import most_positions
from dpo_cache.store import PairSet
from dpo_cache.store.format.model_limits import ModelLimits
from dpo_cache.types import ScoredPair

SCANNED_PAIRS = 4096  # pairs that are read of a larger set, unless a length of the config needs more


@dataclass(frozen=True)
class RowLengths:
    """Rows of pair sets, in tokens."""

    longest: int  # an upper bound
    pair_tokens: float  # mean over the pairs, their shared prompt once


def model_limits(config: PreTrainedConfig, name: str) -> ModelLimits:
    """The limits of a model of this config and name, for `PairSet.limit_to`."""
    text = config.get_text_config()
    return ModelLimits(name, text.vocab_size, most_positions(text))


def measure_rows(pair_sets: Sequence[PairSet], config: PreTrainedConfig) -> RowLengths:
    """The lengths of the rows of all sets.

    A set of more than 4,096 pairs is read to its end only if its rows may pass a length that the config
    names; otherwise the limit that its rows were cut to counts as its longest row.
    """
    rope = rope_limit(config)
    lengths = [limit.tokens for limit in limits_of(config)] + ([rope.tokens] if rope else [])
    longest, tokens, num_read = 1, 0, 0
    for pairs in pair_sets:
        first = list(islice(pairs, SCANNED_PAIRS))
        found = max((_longest(scored) for scored in first), default=1)
        tokens += sum(map(count_pair_tokens, first))
        num_read += len(first)
        cut_to = pairs.manifest["tokenization"]["max_length"]
        if len(pairs) > len(first):
            must_read = any(found < length < cut_to for length in lengths)
            found = max(map(_longest, pairs)) if must_read else cut_to
        longest = max(longest, found)
    return RowLengths(longest, tokens / max(1, num_read))


def _longest(scored: ScoredPair) -> int:
    return max(len(scored.pair.chosen), len(scored.pair.rejected))


def count_pair_tokens(scored: ScoredPair) -> int:
    """Tokens of a pair, its shared prompt once."""
    return len(scored.pair.chosen) + scored.pair.rejected.num_tokens
