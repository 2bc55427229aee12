"""The predicted time, memory and disk of a training run, from the steps of a dry run."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_cache.losses.metrics import Metrics
from dpo_cache.planning.forecast import Forecast
from dpo_cache.planning.timing import passes_of
from dpo_cache.store.folders.local import free_bytes
from dpo_cache.training.evaluations import Schedule
from dpo_cache.training.lengths import count_pair_tokens, measure_rows
from dpo_cache.training.setup import Setup
from dpo_cache.types import ScoredPair


def forecast(setup: Setup, step: Metrics, pairs: Sequence[ScoredPair], disk_bytes: int) -> Forecast:
    """The forecast of a run, from the metrics of a step on these pairs, which are its longest ones.

    The time of a pair is taken as proportional to its tokens. Evaluations count; the samples that they write
    do not.
    """
    mean_tokens = measure_rows([setup.data.pairs], setup.policy.model.config).pair_tokens
    pair_s = mean_tokens / max(1, sum(map(count_pair_tokens, pairs))) * len(pairs) / step["pairs_per_s"]
    passes = passes_of(
        is_adapted=setup.policy.adapted is not None, recomputes_layers=setup.step_memory.mode == "full"
    )
    num_evaluations = count_evaluations(setup.evaluates, setup.total_steps)
    num_evaluated = num_evaluations * int(setup.data.eval_selected.sum())
    num_trained = min(setup.total_steps * setup.options.batch_size, _num_pairs_of_epochs(setup))
    return Forecast(
        seconds=pair_s * (num_trained + num_evaluated / passes),
        device=setup.device.type,
        device_bytes=int(step["peak_bytes"]),
        free_device_bytes=None,  # unknown: this run already uses a part of it
        disk_bytes=disk_bytes,
        free_disk_bytes=free_bytes(setup.output),
        num_workers=setup.ranks.size,
        source="as fast as the second of the two steps",
    )


def count_evaluations(schedule: Schedule, total_steps: int) -> int:
    """Evaluations of a run that has pairs to evaluate on: before the first step, on schedule, at the end."""
    return 2 + schedule.count(1, total_steps - 1)


def _num_pairs_of_epochs(setup: Setup) -> int:
    """Pairs of the run's steps; the last step of an epoch may be smaller."""
    per_epoch = setup.data.num_pairs
    steps_per_epoch = -(-per_epoch // setup.options.batch_size)
    whole, rest = divmod(setup.total_steps, steps_per_epoch)
    return whole * per_epoch + rest * setup.options.batch_size
