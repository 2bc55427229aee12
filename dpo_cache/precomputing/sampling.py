"""The choice of the completions that a run audits. It depends only on the data, so that runs over the same
rows agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dpo_cache.precomputing.units import Unit
from dpo_cache.types import Completion

LEAST_RANDOM = 8  # random completions of a run, at least
UNUSUAL_FIRST, UNUSUAL_EVERY = 8, 1000  # unusual completions of a run: 8, and one more per 1,000
UNUSUAL_SHARE = 0.02  # the first 8 are at most this share of the completions
CANDIDATES = 4096  # completions of a unit that are searched for unusual ones


class Sampler:
    """Chooses the completions of each unit that are audited:

    - at random, one in `interval`, and at least 8 of a run;
    - the longest, if it is longer than all earlier ones;
    - a few with tokens that no audited completion has, the more frequent tokens first: a fault that
      affects only some kind of rows is likely to affect one of them.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._num_seen = self._num_random = self._num_unusual = 0
        self._longest = 0
        self._tokens_seen = np.zeros(0, bool)

    def choose(self, unit: Unit) -> list[int]:
        """Positions in the unit, each once, random ones first."""
        lots = np.array([int.from_bytes(key[:8], "big") for key in unit.keys], np.uint64)
        order = np.argsort(lots, kind="stable")  # keys are digests: their order is random
        num_drawn = int((lots <= np.uint64(2**64 // self._interval - 1)).sum())
        num_random = min(len(unit), max(num_drawn, LEAST_RANDOM - self._num_random))
        chosen = dict.fromkeys(order[:num_random].tolist())
        longest = max(range(len(unit)), key=lambda place: (len(unit.completions[place]), unit.keys[place]))
        if len(unit.completions[longest]) > self._longest:
            self._longest = len(unit.completions[longest])
            chosen[longest] = None
        self._num_random += num_random
        self._num_seen += len(unit)
        self._note(unit.completions[place] for place in chosen)
        candidates = [place for place in order[:CANDIDATES].tolist() if place not in chosen]
        for place in self._unusual([unit.completions[place] for place in candidates]):
            chosen[candidates[place]] = None
            self._num_unusual += 1
        return list(chosen)

    def _num_unusual_left(self) -> int:
        first = min(UNUSUAL_FIRST, int(self._num_seen * UNUSUAL_SHARE))
        return first + self._num_seen // UNUSUAL_EVERY - self._num_unusual

    def _unusual(self, completions: Sequence[Completion]) -> list[int]:
        """Positions of the completions that have the most unseen tokens for their length; a token counts as
        often as completions have it. Each one that is chosen makes its tokens seen.
        """
        chosen: list[int] = []
        num_left = self._num_unusual_left()
        if num_left <= 0 or not completions:
            return chosen
        tokens = [np.unique(completion.sequence_ids) for completion in completions]
        owners, together = np.repeat(np.arange(len(tokens)), [*map(len, tokens)]), np.concatenate(tokens)
        self._grow(int(together.max()) + 1)
        counts = np.bincount(together, minlength=len(self._tokens_seen))
        lengths = np.array([len(completion) for completion in completions])
        while len(chosen) < num_left:
            weights = counts[together] * ~self._tokens_seen[together]
            gains = np.bincount(owners, weights, len(tokens)) / lengths
            best = int(np.argmax(gains))
            if not gains[best]:
                break
            chosen.append(best)
            self._tokens_seen[tokens[best]] = True
        return chosen

    def _note(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            self._grow(int(completion.sequence_ids.max()) + 1)
            self._tokens_seen[completion.sequence_ids] = True

    def _grow(self, size: int) -> None:
        if size > len(self._tokens_seen):
            more = np.zeros(size - len(self._tokens_seen), bool)
            self._tokens_seen = np.concatenate([self._tokens_seen, more])
