"""How far a model is with scoring."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cache.types import Score


@dataclass(frozen=True)
class ScoringStep:
    """What one chunk or batch brought: tokens run through the model, of how many in all, and the completions
    it finished.

    Log-probs may be NaN or infinite where the model's are.
    """

    num_tokens: int
    total_tokens: int
    scores: list[tuple[int, Score]]  # position among the completions given, score


@dataclass(frozen=True)
class ScoringProgress:
    """How far the scoring is. Tokens are those run through the model, pairs those that are scored for."""

    pair_set: str
    num_tokens: int
    total_tokens: int  # of the whole run, known beforehand; of a stream, of the windows read so far
    total_pairs: int
    num_completions: int
    elapsed_s: float  # of scoring

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s

    @property
    def pairs_per_s(self) -> float:
        """Pairs are counted by their share of the tokens: a pair's two answers may be scored far apart."""
        return self.total_pairs * self.num_tokens / self.total_tokens / self.elapsed_s

    @property
    def seconds_left(self) -> float:
        return (self.total_tokens - self.num_tokens) / self.tokens_per_s
