"""store -> lm -> report: how well a policy tells the chosen answers of a pair set from the rejected ones.

open pairs -> load the policy -> score the pairs -> rewards against the cached reference -> write the pairs ->
measure
"""

from __future__ import annotations

import os
import time
from typing import Any

from dpo_cache.evaluation.opening import open_pairs, open_policy
from dpo_cache.evaluation.pair_lines import open_pair_lines
from dpo_cache.evaluation.report import EvalReport, describe_gap, find_gap, find_rewards, measure_pairs
from dpo_cache.evaluation.scoring import OnProgress, score_pairs
from dpo_cache.lm.budget import Budget
from dpo_cache.lm.device import peak_bytes
from dpo_cache.log import Log, log_remark
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.store import open_cache


def evaluate(
    cache: str | os.PathLike[str],
    pairs: str | None,
    model: str | os.PathLike[str],
    *,
    on_progress: OnProgress | None = None,
    log: Log | None = None,
    **options: Any,
) -> EvalReport:
    """Rewards, accuracy and calibration of a policy on a pair set, against the reference log-probs stored
    with it.

    `pairs` is NAME or NAME/SPLIT, None: the only one in the cache. Keyword arguments are the other fields of
    `EvalOptions`. The model is loaded once, and only its own log-probs are computed: the reference's are the
    cached ones, whatever the model is. With `output` the pairs are written, too, one line each: see
    `pair_lines.py`.

    `on_progress` is called after every chunk, `log` gets each remark (default: the package's logger). Raises
    `DpoCacheError`; then nothing is written.
    """
    started = time.perf_counter()
    log = log or log_remark
    chosen = EvalOptions(cache=os.fspath(cache), pairs=pairs, model=os.fspath(model), **options)
    opened = open_cache(chosen.cache)
    pair_set = open_pairs(opened, chosen.pairs, chosen.reference)
    num_pairs = min(chosen.limit or len(pair_set), len(pair_set))
    reference = opened.read_reference(pair_set.reference_id)
    with open_pair_lines(chosen) as write:
        policy = open_policy(chosen, pair_set, reference, log)
        device, dtype = policy.model.device, str(policy.dtype).removeprefix("torch.")
        budget = Budget(number_or_auto("--budget-tokens", chosen.budget_tokens), device, log)
        columns, work = score_pairs(policy, pair_set, num_pairs, budget, on_progress or (lambda _: None))
        rewards = find_rewards(columns, chosen)
        write(columns, rewards)
    gap = find_gap(
        columns,
        policy.is_reference,
        policy.differing,
        policy_dtype=dtype,
        reference_dtype=reference["identity"]["dtype"],
    )
    log(describe_gap(gap, reference["identity"].get("imported")))
    elapsed_s = time.perf_counter() - started
    return EvalReport(
        cache=str(opened),
        pairs=pair_set.name,
        reference=pair_set.reference_id,
        model=chosen.model,
        num_pairs=num_pairs,
        pairs_in_set=len(pair_set),
        attention=policy.attention.name,
        dtype=dtype,
        device=str(device),
        loss=list(chosen.loss),
        beta=chosen.beta,
        gap=gap,
        **measure_pairs(columns, rewards),
        num_completions=work.num_completions,
        data_tokens=work.data_tokens,
        model_tokens=work.model_tokens,
        scoring_s=work.scoring_s,
        elapsed_s=elapsed_s,
        pairs_per_s=num_pairs / elapsed_s,
        peak_bytes=peak_bytes(device),
        output=chosen.output,
    )
