"""Windows -> units of work -> scores in the cache: plain functions, each over one unit.

A unit is self-contained: any process with the same model can score it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cache import data
from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.progress import ScoringStep
from dpo_cache.precomputing.windows import Window
from dpo_cache.store.format.keys import key_bytes
from dpo_cache.types import Completion, Score

if TYPE_CHECKING:
    from dpo_cache.lm.runner import Runner  # imports the code that runs models

FLUSH_S = 20.0  # seconds of scoring that a crash can cost
ROWS_NAMED = 3  # rows that an error about a completion names, at most

Scored = tuple[bytes, Score]  # key, score
OnStep = Callable[[ScoringStep, int], None]  # a step, and how many scores are not published yet


@dataclass(frozen=True)
class Unit:
    """Distinct completions that are scored together, as one forest; the lists are parallel."""

    keys: list[bytes]
    completions: list[Completion]
    rows: list[list[int]]  # the first rows of the data set with the completion
    planned_tokens: int  # tokens of the forest
    pair_set: str = ""  # name of the pair set with the rows

    def __len__(self) -> int:
        return len(self.keys)


def cut_units(windows: Iterable[Window], truncation: data.Truncation, pair_set: str = "") -> Iterator[Unit]:
    """Yield a unit for each window that lacks scores."""
    for window in windows:
        if not len(window.missing_keys):
            continue
        missing = set(key_bytes(window.missing_keys))
        completions: dict[bytes, Completion] = {}
        rows: dict[bytes, list[int]] = {key: [] for key in missing}
        sides = zip(key_bytes(window.chosen_keys), key_bytes(window.rejected_keys), strict=True)
        for pair, keys in zip(data.kept_pairs(window.rows, truncation), sides, strict=True):
            for key, completion in zip(keys, (pair.chosen, pair.rejected), strict=True):
                if key in missing:
                    completions.setdefault(key, completion)
                    if len(rows[key]) < ROWS_NAMED:
                        rows[key].append(pair.row)
        yield Unit(
            list(completions),
            list(completions.values()),
            [rows[key] for key in completions],
            window.missing_tokens,
            pair_set,
        )


def take(unit: Unit, places: Sequence[int]) -> Unit:
    """A unit with the completions at these places, in this order."""
    completions = [unit.completions[place] for place in places]
    return Unit(
        [unit.keys[place] for place in places],
        completions,
        [unit.rows[place] for place in places],
        count_forest_tokens(completions),
        unit.pair_set,
    )


def score_unit(
    unit: Unit, runner: Runner, publish: Callable[[Sequence[Scored]], None], on_step: OnStep
) -> None:
    """Score the unit's completions and hand their scores to `publish`, at the latest every 20 seconds, or at
    the end of each window where the model runs layer by layer.

    If Ctrl-C, SIGTERM or an error ends the scoring, even in the middle of `publish`, every score that was
    computed is still published.
    """
    waiting: list[Scored] = []

    def flush() -> None:
        if waiting:
            publish(waiting)
            waiting.clear()

    flushed = time.perf_counter()
    try:
        for step in runner.score(unit.completions, rows_of=unit.rows.__getitem__):
            waiting += [(unit.keys[index], score) for index, score in step.scores]
            if time.perf_counter() - flushed >= FLUSH_S and not step.is_followed:
                flush()
                flushed = time.perf_counter()
            on_step(step, len(waiting))
        flush()
    except BaseException:
        flush()
        raise
