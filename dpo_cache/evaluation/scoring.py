"""store -> lm: the policy's log-probs of every pair beside those of the reference, a window of pairs at a
time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice

import numpy as np

from dpo_cache.errors import ModelError, shown_rows
from dpo_cache.evaluation.opening import EvaluatedModel, check_room
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.progress import ScoringProgress
from dpo_cache.lm.self_check import score_completions
from dpo_cache.store import PairSet, completion_key
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
    """What the scoring took."""

    data_tokens: int = 0  # prompt + answer of every completion, as an unpadded batch would run them
    model_tokens: int = 0  # actually run
    num_completions: int = 0  # distinct within a window
    scoring_s: float = 0.0


def score_pairs(
    policy: EvaluatedModel, pairs: PairSet, num_pairs: int, budget: Budget, on_progress: OnProgress
) -> tuple[PairColumns, Work]:
    """The first `num_pairs` pairs under the policy, in the order of the set.

    Within a window of 16,384 pairs each distinct completion is scored once, and each prefix that some share;
    token ids and token log-probs are held of one window at a time. Raises `ModelError` where a log-prob is no
    number.
    """
    windows, work, num_done = [], Work(), 0
    stream = iter(islice(pairs, num_pairs))
    while window := list(islice(stream, WINDOW_PAIRS)):
        _check_window(policy, window)
        sums = _score_window(
            policy, window, budget, work, _Progress(pairs.name, num_pairs, num_done, len(window), on_progress)
        )
        windows.append(_columns(window, sums))
        num_done += len(window)
    return PairColumns(
        **{
            entry.name: np.concatenate([getattr(part, entry.name) for part in windows])
            for entry in fields(PairColumns)
        }
    ), work


@dataclass(frozen=True)
class _Progress:
    """Tells how far the run is; windows to come are taken to run as many tokens a pair as those before."""

    pair_set: str
    num_pairs: int
    num_done: int
    num_window: int
    tell: OnProgress

    def __call__(self, work: Work, known_tokens: int, num_completions: int) -> None:
        planned = self.num_done + self.num_window
        total = known_tokens + round((self.num_pairs - planned) * known_tokens / planned)
        self.tell(
            ScoringProgress(
                self.pair_set, work.model_tokens, total, self.num_pairs, num_completions, work.scoring_s
            )
        )


def _score_window(
    policy: EvaluatedModel, window: Sequence[ScoredPair], budget: Budget, work: Work, progress: _Progress
) -> dict[bytes, float]:
    """Log-prob of each distinct completion of the window, by its key."""
    distinct = {completion_key(completion): completion for scored in window for completion in _sides(scored)}
    keys, completions = list(distinct), list(distinct.values())
    work.data_tokens += sum(len(completion) for scored in window for completion in _sides(scored))
    run_before, scored_before, started = work.model_tokens, work.scoring_s, time.perf_counter()
    sums: dict[bytes, float] = {}
    for step in score_completions(policy.model, completions, policy.attention, budget):
        _check_finite(policy, window, completions, step.scores, budget)
        sums.update((keys[index], score.logps) for index, score in step.scores)
        work.model_tokens += step.num_tokens
        work.scoring_s = scored_before + time.perf_counter() - started
        progress(work, run_before + step.total_tokens, work.num_completions + len(sums))
    work.num_completions += len(sums)
    return sums


def _columns(window: Sequence[ScoredPair], sums: dict[bytes, float]) -> PairColumns:
    return PairColumns(
        row=np.array([scored.pair.row for scored in window]),
        prompt_tokens=np.array([len(scored.pair.chosen.prompt_ids) for scored in window]),
        chosen_tokens=np.array([scored.pair.chosen.num_tokens for scored in window]),
        rejected_tokens=np.array([scored.pair.rejected.num_tokens for scored in window]),
        policy_chosen_logps=np.array([sums[completion_key(scored.pair.chosen)] for scored in window]),
        policy_rejected_logps=np.array([sums[completion_key(scored.pair.rejected)] for scored in window]),
        ref_chosen_logps=np.array([scored.ref_chosen.logps for scored in window]),
        ref_rejected_logps=np.array([scored.ref_rejected.logps for scored in window]),
    )


def _check_window(policy: EvaluatedModel, window: Sequence[ScoredPair]) -> None:
    for scored in window:
        largest = max(
            int(ids.max()) for side in _sides(scored) for ids in (side.prompt_ids, side.completion_ids)
        )
        check_room(
            policy.model.config, policy.location, largest, max(map(len, _sides(scored))), scored.pair.row
        )


def _check_finite(
    policy: EvaluatedModel,
    window: Sequence[ScoredPair],
    completions: Sequence[Completion],
    scores: Sequence[tuple[int, Score]],
    budget: Budget,
) -> None:
    """Raise `ModelError` naming the rows of the completions whose log-probs are no numbers."""
    spoiled = [completions[index] for index, score in scores if not np.isfinite(score.token_logps).all()]
    if not spoiled:
        return
    alone = [
        completion for completion in spoiled if _is_spoiled_alone(policy, completion, budget)
    ]  # what is run beside one is spoiled with it
    culprits = {completion_key(completion) for completion in alone or spoiled}
    rows = [
        scored.pair.row
        for scored in window
        if any(completion_key(side) in culprits for side in _sides(scored))
    ]
    shown = shown_rows(rows)
    one_of = "" if alone else " or of one that is scored beside it"
    raise ModelError(
        f"{policy.location} gives a log-prob that is NaN or infinite for "
        f"row{'s' if len(rows) > 1 else ''} {shown}{one_of}.\n"
        f"Its weights may be damaged, or {str(policy.dtype).removeprefix('torch.')} too small for it: try "
        "--dtype float32."
    )


def _is_spoiled_alone(policy: EvaluatedModel, completion: Completion, budget: Budget) -> bool:
    alone = score_completions(
        policy.model,
        [completion],
        policy.attention,
        Budget(budget.tokens, policy.model.device, lambda _: None),
    )
    return any(not np.isfinite(score.token_logps).all() for step in alone for _, score in step.scores)


def _sides(scored: ScoredPair) -> tuple[Completion, Completion]:
    return scored.pair.chosen, scored.pair.rejected
