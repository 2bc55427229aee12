"""store -> lm: the policy's log-probs of every pair, next to those of the reference, a window of pairs at a
time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np

from dpo_cache.evaluation.loss_inputs import loss_inputs
from dpo_cache.evaluation.opening import check_room
from dpo_cache.lm.progress import ScoringProgress, extrapolate
from dpo_cache.lm.runner import Runner
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.store import PairSet, completion_key
from dpo_cache.training.pair_logps import join_pairs
from dpo_cache.types import Completion, Score, ScoredPair

WINDOW_PAIRS = 16384  # sorted and scored at once, as in `precompute`

OnProgress = Callable[[ScoringProgress], None]


@dataclass(frozen=True)
class PairColumns:
    """The pairs as columns, one entry a pair; log-probs are sums over an answer's tokens, in nats,
    float64.
    """

    row: np.ndarray
    prompt_tokens: np.ndarray  # of the chosen answer's prompt
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    policy_chosen_logps: np.ndarray
    policy_rejected_logps: np.ndarray
    ref_chosen_logps: np.ndarray
    ref_rejected_logps: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


@dataclass
class Work:
    """Counts what the scoring has run."""

    data_tokens: int = 0  # prompt + answer of every completion, as an unpadded batch would run them
    model_tokens: int = 0  # actually run
    num_completions: int = 0  # distinct within a window
    scoring_s: float = 0.0


def score_pairs(
    runner: Runner, pairs: PairSet, num_pairs: int, objective: Objective, on_progress: OnProgress
) -> tuple[PairColumns, PairLogps, Work]:
    """The first `num_pairs` pairs under the policy, in the order of the set, and the inputs of the losses.

    Within a window of 16,384 pairs each distinct completion is scored once, and each prefix that several
    share; token ids and token log-probs of only one window are in memory at a time. Raises `ModelError` for a
    log-prob that is NaN or infinite.
    """
    windows, inputs, work, num_done = [], [], Work(), 0
    stream = iter(islice(pairs, num_pairs))
    while window := list(islice(stream, WINDOW_PAIRS)):
        _check_window(runner, window)
        progress = _Progress(pairs.name, num_pairs, num_done + len(window), on_progress)
        scores = _score_window(runner, window, work, progress)
        windows.append(_columns(window, scores))
        inputs.append(loss_inputs(objective, window, scores, runner))
        num_done += len(window)
    columns = PairColumns(
        **{
            entry.name: np.concatenate([getattr(part, entry.name) for part in windows])
            for entry in fields(PairColumns)
        }
    )
    return columns, join_pairs(inputs), work


@dataclass(frozen=True)
class _Progress:
    """Reports the progress of a run; later windows are expected to run as many tokens a pair as those so
    far.
    """

    pair_set: str
    num_pairs: int
    num_known: int  # pairs of the windows read so far
    report: OnProgress

    def __call__(self, work: Work, known_tokens: int, num_completions: int) -> None:
        total = extrapolate(known_tokens, self.num_known, self.num_pairs)
        self.report(
            ScoringProgress(
                self.pair_set, work.model_tokens, total, self.num_pairs, num_completions, work.scoring_s
            )
        )


def _score_window(
    runner: Runner, window: Sequence[ScoredPair], work: Work, progress: _Progress
) -> dict[bytes, Score]:
    """The score of each distinct completion of the window, by its key."""
    distinct = {completion_key(completion): completion for scored in window for completion in _sides(scored)}
    keys, completions = list(distinct), list(distinct.values())

    def rows_of(index: int) -> list[int]:
        return [
            scored.pair.row
            for scored in window
            if any(completion_key(side) == keys[index] for side in _sides(scored))
        ]

    work.data_tokens += sum(len(completion) for scored in window for completion in _sides(scored))
    run_before, scored_before, started = work.model_tokens, work.scoring_s, time.perf_counter()
    scores: dict[bytes, Score] = {}
    for step in runner.score(completions, rows_of=rows_of):
        scores.update((keys[index], score) for index, score in step.scores)
        work.model_tokens += step.num_tokens
        work.scoring_s = scored_before + time.perf_counter() - started
        progress(work, run_before + step.total_tokens, work.num_completions + len(scores))
    work.num_completions += len(scores)
    return scores


def _columns(window: Sequence[ScoredPair], scores: dict[bytes, Score]) -> PairColumns:
    return PairColumns(
        row=np.array([scored.pair.row for scored in window]),
        prompt_tokens=np.array([len(scored.pair.chosen.prompt_ids) for scored in window]),
        chosen_tokens=np.array([scored.pair.chosen.num_tokens for scored in window]),
        rejected_tokens=np.array([scored.pair.rejected.num_tokens for scored in window]),
        policy_chosen_logps=np.array([scores[completion_key(scored.pair.chosen)].logps for scored in window]),
        policy_rejected_logps=np.array(
            [scores[completion_key(scored.pair.rejected)].logps for scored in window]
        ),
        ref_chosen_logps=np.array([scored.ref_chosen.logps for scored in window]),
        ref_rejected_logps=np.array([scored.ref_rejected.logps for scored in window]),
    )


def _check_window(runner: Runner, window: Sequence[ScoredPair]) -> None:
    for scored in window:
        largest = max(
            int(ids.max()) for side in _sides(scored) for ids in (side.prompt_ids, side.completion_ids)
        )
        longest = max(map(len, _sides(scored)))
        check_room(runner.model.config, runner.name, largest, longest, scored.pair.row)


def _sides(scored: ScoredPair) -> tuple[Completion, Completion]:
    return scored.pair.chosen, scored.pair.rejected
