"""The progress of scoring."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cache.types import Score


@dataclass(frozen=True)
class ScoringStep:
    """The result of one chunk or batch: its tokens, of how many in all, and the completions that it finished.

    Log-probs may be NaN or infinite; `Runner.score` refuses them. Layer by layer, the tokens of a window come
    with its layers, and its scores at the end.
    """

    num_tokens: int
    total_tokens: int
    scores: list[tuple[int, Score]]  # position among the completions given, score
    is_followed: bool = False  # by the next step at once, which needs no computation
    trial_tokens: int = 0  # the chunk size that is tried, while the best one is searched for


@dataclass(frozen=True)
class ScoringProgress:
    """How much of a run is scored."""

    pair_set: str
    num_tokens: int  # run through the model
    total_tokens: int  # tokens of the whole run; for a stream, those of the windows read so far
    total_pairs: int
    num_completions: int
    elapsed_s: float  # time of scoring
    num_workers: int = 0  # at work; 0: this process scores
    trial_tokens: int = 0  # of the step

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


def extrapolate(known_tokens: int, known: int, total: int) -> int:
    """Tokens of a whole run, if each unit of work left takes as many as the known ones on average.

    The unit of work is any: pairs, or planned tokens (padded rows run more tokens than planned).
    """
    return known_tokens + round((total - known) * known_tokens / known)
