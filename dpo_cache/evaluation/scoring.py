"""store -> lm: the policy's log-probs of every pair, next to those of the reference, a window of pairs at a
time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice

import numpy as np
import torch

from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.policy import PolicyModel, count_tokens
from dpo_cache.lm.progress import ScoringProgress, extrapolate
from dpo_cache.lm.runner import Runner
from dpo_cache.losses.objective import Objective, PairLogps
from dpo_cache.losses.reference_losses import wpo_weights
from dpo_cache.store import PairSet, completion_key
from dpo_cache.training.batches import completions_of, split_step
from dpo_cache.training.pair_logps import join_pairs, reference_logps, summed_logps
from dpo_cache.types import Completion, Score, ScoredPair

WINDOW_PAIRS = 16384  # pairs that are sorted and scored at once, as in `precompute`

OnProgress = Callable[[ScoringProgress], None]


@dataclass(frozen=True)
class PairColumns:
    """The pairs as columns with one entry for each pair; log-probs are sums over an answer's tokens, in nats,
    float64.
    """

    row: np.ndarray
    prompt_tokens: np.ndarray  # tokens of the chosen answer's prompt
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    policy_chosen_logps: np.ndarray
    policy_rejected_logps: np.ndarray
    ref_chosen_logps: np.ndarray
    ref_rejected_logps: np.ndarray


@dataclass
class Work:
    """Counts of the scoring so far."""

    data_tokens: int = 0  # prompt + answer of every completion, as an unpadded batch would run them
    model_tokens: int = 0  # tokens that the model ran
    num_completions: int = 0  # completions that are distinct within a window
    scoring_s: float = 0.0


def score_pairs(
    runner: Runner, pairs: PairSet, num_pairs: int, objective: Objective, on_progress: OnProgress
) -> tuple[PairColumns, PairLogps, Work]:
    """The first `num_pairs` pairs under the policy, in the order of the set, and the inputs of the losses.

    Within a window of 16,384 pairs each distinct completion is scored once, and each prefix that several
    share is run once; token ids and token log-probs of only one window are in memory at a time. Raises
    `ModelError` for a log-prob that is NaN or infinite.
    """
    windows, inputs, work, num_read = [], [], Work(), 0

    def report(known_tokens: int, num_completions: int, trial_tokens: int) -> None:
        """Report progress, assuming that later windows run as many tokens a pair as those so far."""
        total_tokens = extrapolate(known_tokens, num_read, num_pairs)
        on_progress(
            ScoringProgress(
                pairs.name,
                work.model_tokens,
                total_tokens,
                num_pairs,
                num_completions,
                work.scoring_s,
                trial_tokens=trial_tokens,
            )
        )

    stream = iter(islice(pairs, num_pairs))
    while window := list(islice(stream, WINDOW_PAIRS)):
        num_read += len(window)
        policy = _score_window(runner, window, work, report)
        windows.append(_columns(window, policy))
        inputs.append(_loss_inputs(objective, window, policy, windows[-1], runner))
    columns = PairColumns(
        **{
            entry.name: np.concatenate([getattr(part, entry.name) for part in windows])
            for entry in fields(PairColumns)
        }
    )
    return columns, join_pairs(inputs), work


def _score_window(
    runner: Runner, window: Sequence[ScoredPair], work: Work, report: Callable[[int, int, int], None]
) -> list[Score]:
    """The scores of all chosen completions of the window, then of all rejected ones; equal completions are
    scored once.
    """
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
        report(run_before + step.total_tokens, work.num_completions + len(scores), step.trial_tokens)
    work.num_completions += len(scores)
    return [scores[completion_key(completion)] for completion in completions_of(window)]


def _columns(window: Sequence[ScoredPair], policy: Sequence[Score]) -> PairColumns:
    policy_chosen, policy_rejected = np.split(summed_logps(policy), 2)
    ref_chosen, ref_rejected = np.split(reference_logps(window), 2)
    return PairColumns(
        row=np.array([scored.pair.row for scored in window]),
        prompt_tokens=np.array([len(scored.pair.chosen.prompt_ids) for scored in window]),
        chosen_tokens=np.array([scored.pair.chosen.num_tokens for scored in window]),
        rejected_tokens=np.array([scored.pair.rejected.num_tokens for scored in window]),
        policy_chosen_logps=policy_chosen,
        policy_rejected_logps=policy_rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
    )


def _loss_inputs(
    objective: Objective,
    window: Sequence[ScoredPair],
    policy: Sequence[Score],
    columns: PairColumns,
    runner: Runner,
) -> PairLogps:
    """The result of training's `pair_logps`, as float64 on the CPU."""
    chosen, rejected = torch.from_numpy(summed_logps(policy, objective.ld_alpha)).chunk(2)
    reference = reference_logps(window, objective.ld_alpha if objective.ld_reference else None)
    ref_chosen, ref_rejected = torch.from_numpy(reference).chunk(2)
    return PairLogps(
        chosen=chosen,
        rejected=rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_sums=torch.from_numpy(columns.policy_chosen_logps),
        chosen_lengths=torch.from_numpy(columns.chosen_tokens).double(),
        rejected_lengths=torch.from_numpy(columns.rejected_tokens).double(),
        weights=_weights(objective, window, runner),
    )


@torch.no_grad()
def _weights(objective: Objective, window: Sequence[ScoredPair], runner: Runner) -> torch.Tensor:
    """Weights of the pairs under WPO, from another forward pass, because WPO needs whole distributions."""
    if objective.wpo == "off":
        return torch.ones(len(window), dtype=torch.float64)
    policy = PolicyModel(runner.model, runner.attention, with_squares=True)
    count = partial(count_tokens, runner.attention)
    found: dict[int, torch.Tensor] = {}  # keyed by `id` of the pair
    while left := [scored for scored in window if id(scored) not in found]:
        try:
            for group in split_step(left, runner.budget.tokens, count):
                (logps,) = policy([completions_of(group.pairs)])
                means = logps.excess_means().to("cpu", torch.float64).chunk(2)
                weights = wpo_weights(*means, clipped=objective.wpo == "clipped")
                found.update(zip(map(id, group.pairs), weights, strict=True))
        except RuntimeError as error:
            if not is_out_of_memory(error, runner.model.device):
                raise
            runner.budget.halve(error)
    return torch.stack([found[id(scored)] for scored in window])


def _sides(scored: ScoredPair) -> tuple[Completion, Completion]:
    return scored.pair.chosen, scored.pair.rejected
