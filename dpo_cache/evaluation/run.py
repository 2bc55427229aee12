"""store -> lm -> report: measure how well a policy separates the chosen answers of a pair set from the
rejected ones.

open pairs -> identify the policy -> score the pairs -> rewards against the cached reference -> write the
pairs -> measure
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_cache.evaluation.opening import EvaluatedModel, check_token_logps, identify_policy, open_pairs
from dpo_cache.evaluation.pair_lines import open_pair_lines
from dpo_cache.evaluation.report import EvalReport, describe_gap, find_gap, find_rewards, measure_pairs
from dpo_cache.evaluation.scoring import OnProgress, score_pairs
from dpo_cache.lm.device import peak_bytes
from dpo_cache.lm.runner import Runner, open_runner
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.losses.objective import Objective
from dpo_cache.losses.terms import SETTINGS
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.keywords import keywords_of
from dpo_cache.options.run_losses import read_run, with_run
from dpo_cache.progress import show_scoring, shows_progress
from dpo_cache.store import open_cache
from dpo_cache.training.pair_logps import evaluated_at_once, objective_of


@keywords_of(EvalOptions)
@shows_progress("evaluating", show_scoring)
@keeps_remarks
def evaluate(
    cache: str | os.PathLike[str],
    pairs: str | None = None,
    model: str | os.PathLike[str] | None = None,
    *,
    on_progress: OnProgress | None = None,
    log: Log | None = None,
    **options: Any,
) -> EvalReport:
    """Rewards, accuracy and calibration of a policy on a pair set, against the reference log-probs stored
    with it.

    `pairs` is NAME or NAME/SPLIT, None: the only one in the cache. The model is loaded once, and only its own
    log-probs are computed: the reference's are the cached ones, whatever the model is. With `output` the
    pairs are written as well, one line each: see `pair_lines.py`.

    With `run`, the folder of a training run, the loss settings that are not given are those of the run, and
    `model` is by default its model. Without `run`, the run of a model in RUN/model or RUN/best is found.

    `progress=True` shows on stderr what the command line shows. `on_progress` is called after every chunk,
    `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too. Raises
    `DpoCacheError`; then nothing is written.
    """
    started = time.perf_counter()
    log = log or log_remark
    given = {"cache": cache, "pairs": pairs, "model": model, **options}
    chosen = EvalOptions(**with_run(given, log))
    objective = objective_of(chosen)
    opened = open_cache(chosen.cache)
    pair_set = open_pairs(opened, chosen.pairs, chosen.reference)
    check_token_logps(chosen, pair_set)
    num_pairs = min(chosen.limit or len(pair_set), len(pair_set))
    reference = opened.read_reference(pair_set.reference_id)
    with open_pair_lines(chosen) as write:
        policy = identify_policy(chosen, pair_set, reference, log)
        max_length = pair_set.manifest["tokenization"]["max_length"]
        with _open_runner(chosen, policy, max_length, log) as runner:
            report_progress = on_progress or (lambda _: None)
            columns, logps, work = score_pairs(runner, pair_set, num_pairs, objective, report_progress)
            attention = runner.attention.name
        rewards = find_rewards(logps, objective, _pairs_at_once(chosen.run, objective, log))
        write(columns, rewards)
    gap = find_gap(
        columns,
        policy.is_reference,
        policy.differing,
        policy_dtype=policy.dtype_name,
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
        attention=attention,
        dtype=policy.dtype_name,
        device=str(policy.device),
        run=chosen.run,
        loss=list(chosen.loss),
        beta=chosen.beta,
        loss_settings={name: getattr(chosen, name) for name in SETTINGS},
        gap=gap,
        **measure_pairs(columns, rewards),
        **asdict(work),
        elapsed_s=elapsed_s,
        pairs_per_s=num_pairs / elapsed_s,
        peak_bytes=peak_bytes(policy.device),
        output=chosen.output,
    )


def _pairs_at_once(run: str | None, objective: Objective, log: Log) -> int | None:
    """How many pairs the evaluations of the run computed losses over; None without a run: all pairs."""
    config = read_run(Path(run)) if run else None
    if config is None:
        return None
    if coefficient := config["resolved"].get("router_coefficient"):
        log(
            f"the losses of the run include {coefficient:g} times the router loss of its mixture of experts; "
            "the loss of this evaluation does not."
        )
        objective = replace(objective, router_coefficient=coefficient)
    return evaluated_at_once(objective, config["batch_size"])


def _open_runner(
    options: EvalOptions, policy: EvaluatedModel, max_length: int, log: Log
) -> AbstractContextManager[Runner]:
    return open_runner(
        options.model,
        dtype=policy.dtype,
        device=policy.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        attention=options.attention,
        max_length=max_length,
        budget_tokens=number_or_auto("budget_tokens", options.budget_tokens),
        log=log,
    )
