"""Units of about equal size, cut from a window's completions where neighbours share the fewest tokens.

A unit is a forest of its own, so the prefix that its first completion shares with the one before it is run
twice. Over dialogues that is 20 to 28% more tokens in units of 1,024 tokens, 0.3% in units of 8,192 and 0.05%
in units of 32,768.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from dpo_cache import data
from dpo_cache.lm.forest.layout import count_forest_tokens, sort_completions
from dpo_cache.precomputing.fresh_keys import FreshKeys
from dpo_cache.precomputing.units import Unit, cut_units, take
from dpo_cache.precomputing.windows import Window

NEAR = 0.25  # a unit's size may differ by this share from the wanted one
MIN_TOKENS = 8192  # least size that is chosen for a unit
UNIT_S = 20.0  # seconds of scoring that a chosen size takes
UNITS_PER_WORKER = 16  # at least so many, so that all workers end at about the same time


class UnitSize:
    """The wanted tokens of the next unit: a fixed number, a worker's share of the run (`one_each`), or as
    many as were recently scored in 20 s.

    The last of these gives each of several workers at least 16 units, and starts at `first_tokens`.
    """

    def __init__(
        self,
        fixed: int | None,
        *,
        one_each: bool = False,
        num_workers: int = 1,
        run_tokens: Callable[[], int] = lambda: 0,
        first_tokens: int = MIN_TOKENS,
    ):
        self.num_workers = num_workers
        self._one_each = one_each
        self._fixed, self._run_tokens, self._in_time = fixed, run_tokens, first_tokens

    @property
    def tokens(self) -> int:
        if self._fixed is not None:
            return self._fixed
        if self._one_each:
            return max(1, self._run_tokens() // self.num_workers)
        share = self._run_tokens() // (UNITS_PER_WORKER * self.num_workers)
        return max(MIN_TOKENS, min(self._in_time, share) if self.num_workers > 1 else self._in_time)

    def note(self, planned_tokens: int, elapsed_s: float) -> None:
        """Record how long a unit took one worker."""
        if elapsed_s > 0:
            self._in_time = int(UNIT_S * planned_tokens / elapsed_s)


class Units:
    """Draws the units of a run, in random order, without the completions that others have scored meanwhile:
    two runs over the same data thus share the work.
    """

    def __init__(self, fresh: FreshKeys, truncation: data.Truncation, size: UnitSize | None):
        """`size` None makes one unit of each window."""
        self.size = size
        self._fresh, self._truncation = fresh, truncation
        self._random = random.Random()  # the global state is not changed
        self.completions_elsewhere = 0  # completions that other runs have scored since this one was planned
        self.tokens_elsewhere = 0

    def draw(self, windows: Iterable[Window], pair_set: str) -> Iterator[Unit]:
        """Yield the missing completions of the windows, which are drawn in random order if they are a list.

        The wanted size is read when a window is cut. If it has doubled or halved since, the rest of the
        window is cut again.
        """
        if isinstance(windows, Sequence):
            windows = self._random.sample(windows, len(windows))
        for whole in cut_units(windows, self._truncation, pair_set):
            left: Unit | None = whole
            while left is not None:
                left = yield from self._draw_some(left)

    def _draw_some(self, whole: Unit) -> Generator[Unit, None, Unit | None]:
        """Yield units until the wanted size has changed; returns the rest of the completions as one unit."""
        wanted = self.size.tokens if self.size else None
        units = [whole] if wanted is None else cut_unit(whole, wanted)
        self._random.shuffle(units)
        for number, unit in enumerate(units, 1):
            if missing := self._still_missing(unit):
                yield missing
            if self.size and wanted and not wanted / 2 < self.size.tokens < wanted * 2 and units[number:]:
                return join(units[number:])
        return None

    def _still_missing(self, unit: Unit) -> Unit | None:
        is_missing = ~self._fresh.contains(unit.keys)
        if is_missing.all():
            return unit
        left = take(unit, np.flatnonzero(is_missing).tolist()) if is_missing.any() else None
        self.completions_elsewhere += int((~is_missing).sum())
        self.tokens_elsewhere += unit.planned_tokens - (left.planned_tokens if left else 0)
        return left


def cut_unit(unit: Unit, unit_tokens: int) -> list[Unit]:
    """The unit's completions in units of about so many tokens, neighbours together.

    A unit's forest has the wanted tokens or up to 25% more or fewer, and ends where the next completion
    shares the fewest. Only where that is impossible, as with a longer completion or fewer than two units in
    all, a unit has more or fewer.
    """
    order, shared = sort_completions(unit.completions)
    lengths = np.array([len(unit.completions[place]) for place in order], np.int64)
    bounds = cut_places(lengths, shared, unit_tokens)
    if len(bounds) == 2:
        return [unit]
    return [take(unit, order[start:end]) for start, end in pairwise(bounds)]


def cut_places(lengths: np.ndarray, shared: np.ndarray, unit_tokens: int) -> list[int]:
    """The positions at which to cut sorted completions, from 0 to their number.

    `lengths` are their tokens, and `shared` those that each shares with the one before it: int64 [N].
    """
    ends = np.cumsum(lengths - shared)  # tokens of the forest up to each completion
    bounds = [0]
    while bounds[-1] < len(lengths):
        start = bounds[-1]
        tokens = ends[start:] - ends[start] + lengths[start]  # tokens of a unit that ends at each place
        bounds.append(start + _choose_end(tokens, shared[start + 1 :], unit_tokens))
    return bounds


def _choose_end(tokens: np.ndarray, shared_with_next: np.ndarray, unit_tokens: int) -> int:
    """The number of completions of the next unit, such that the remaining ones make units of about the wanted
    size, too.
    """
    left = int(tokens[-1])
    num_after = _num_units(left, unit_tokens) - 1
    if num_after == 0:
        return len(tokens)
    near = np.array([1 - NEAR, 1 + NEAR]) * unit_tokens
    least, most = max(near[0], left - num_after * near[1]), min(near[1], left - num_after * near[0])
    mean = left / (num_after + 1)
    first, after = _between(tokens, least, most, len(shared_with_next))
    if first >= after:  # no end fits: a long completion, or a number of tokens that does not divide well
        first, after = _between(tokens, (1 - NEAR) * mean, (1 + NEAR) * mean, len(shared_with_next))
    if first >= after:
        return min(first + 1, len(tokens))
    distance = np.abs(tokens[first:after] - mean)
    return first + int(np.lexsort((distance, shared_with_next[first:after]))[0]) + 1


def _num_units(num_tokens: int, unit_tokens: int) -> int:
    """The number of equal units whose size is nearest to the wanted one."""
    fewer = max(1, num_tokens // unit_tokens)
    is_nearer = num_tokens / fewer - unit_tokens <= unit_tokens - num_tokens / (fewer + 1)
    return fewer if is_nearer else fewer + 1


def _between(ascending: np.ndarray, least: float, most: float, limit: int) -> tuple[int, int]:
    """The first position whose value is within the bounds, and the position after the last one, at most
    `limit`.
    """
    first, after = np.searchsorted(ascending, least), np.searchsorted(ascending, most, side="right")
    return int(first), min(int(after), limit)


def join(units: Sequence[Unit]) -> Unit:
    """One unit with the completions of all, which are distinct."""
    completions = [completion for unit in units for completion in unit.completions]
    return Unit(
        [key for unit in units for key in unit.keys],
        completions,
        [rows for unit in units for rows in unit.rows],
        count_forest_tokens(completions),
        units[0].pair_set,
    )
