"""store -> lm -> report: measure how well a policy separates the chosen answers of a pair set from the
rejected ones.

open pairs -> identify the policy -> score the pairs -> rewards against the cached reference -> write the
pairs -> measure
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpo_cache.evaluation.opening import EvaluatedModel, identify_policy, open_pairs
from dpo_cache.evaluation.pair_lines import open_pair_lines
from dpo_cache.evaluation.report import (
    EvalReport,
    Rewards,
    describe_gap,
    find_gap,
    find_rewards,
    measure_pairs,
)
from dpo_cache.evaluation.scoring import OnProgress, PairColumns, score_pairs
from dpo_cache.lm.check_logps import FOREST, STREAM
from dpo_cache.lm.device import peak_bytes
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.quantization import rounding_dtype_of
from dpo_cache.lm.model.unchanged import one_checkpoint
from dpo_cache.lm.runner import open_runner
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.losses.objective import Objective
from dpo_cache.losses.terms import SETTINGS
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.keywords import keywords_of
from dpo_cache.options.run_losses import read_run, with_run
from dpo_cache.progress import show_scoring, shows_progress
from dpo_cache.store import Cache, PairSet, open_cache
from dpo_cache.training.batches import count_shared
from dpo_cache.training.lengths import measure_rows, model_limits
from dpo_cache.training.pair_logps import evaluated_at_once, objective_of
from dpo_cache.types import token_rounding


@keywords_of(EvalOptions)
@shows_progress("evaluating", show_scoring)
@keeps_remarks
@one_checkpoint()
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
    log-probs are computed: those of the reference are always read from the cache. With `output` the
    pairs are written as well, one line each: see `pair_lines.py`.

    With `run`, the folder of a training run, the loss settings that are not given are those of the run, and
    `model` is by default its model. Without `run`, the run of a model in RUN/model or RUN/best is found.

    `progress=True` shows on stderr what the command line shows. `on_progress` is called after every chunk,
    `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too. Raises
    `DpoCacheError`; then nothing is written.
    """
    started = time.perf_counter()
    log = log or log_remark
    chosen = EvalOptions(**with_run({"cache": cache, "pairs": pairs, "model": model, **options}, log))
    opened = open_cache(chosen.cache)
    pair_set = open_pairs(opened, chosen)
    reference = opened.read_reference(pair_set.reference_id)
    _log_trained_pairs(chosen, opened, pair_set, log)
    with open_pair_lines(chosen) as write:
        policy = identify_policy(chosen, pair_set, reference, log)
        scored_in = rounding_dtype_of(reference["identity"])
        rounding = token_rounding(policy.dtype_name, scored_in)  # of log-probs
        objective = objective_of(chosen, token_rounding=token_rounding(scored_in, *policy.rounding_dtypes))
        columns, rewards, work = _score(chosen, policy, pair_set, objective, on_progress, log)
        write(columns, rewards)
    gap = find_gap(columns, policy, reference["identity"]["dtype"])
    log(describe_gap(gap, reference["identity"].get("imported")))
    return _report(
        chosen,
        pair_set,
        policy,
        started,
        cache=str(opened),
        gap=gap,
        **measure_pairs(columns, rewards, rounding),
        **work,
    )


def _score(
    options: EvalOptions,
    policy: EvaluatedModel,
    pairs: PairSet,
    objective: Objective,
    on_progress: OnProgress | None,
    log: Log,
) -> tuple[PairColumns, Rewards, dict[str, Any]]:
    """The scored pairs, their rewards, and the fields of the report about the scoring."""
    num_pairs = min(options.limit or len(pairs), len(pairs))
    config = load_config(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    pairs.limit_to(model_limits(config, options.model))
    rows = measure_rows([pairs], config)
    with open_runner(
        options.model,
        dtype=policy.dtype,
        device=policy.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        attention=options.attention,
        max_length=rows.longest,
        run_tokens=int(rows.pair_tokens * num_pairs),
        ways=(STREAM,) if objective.wpo == "off" else (STREAM, FOREST),
        budget_tokens=number_or_auto("budget_tokens", options.budget_tokens),
        log=log,
    ) as runner:
        columns, logps, work = score_pairs(
            runner, pairs, num_pairs, objective, on_progress or (lambda _: None)
        )
        attention = runner.attention.name
    rewards = find_rewards(logps, objective, _pairs_at_once(options.run, objective, log))
    return columns, rewards, {"attention": attention, **asdict(work)}


def _report(
    options: EvalOptions, pairs: PairSet, policy: EvaluatedModel, started: float, **measured: Any
) -> EvalReport:
    num_pairs, elapsed_s = measured["accuracy"].count, time.perf_counter() - started
    return EvalReport(
        pairs=pairs.name,
        reference=pairs.reference_id,
        model=options.model,
        num_pairs=num_pairs,
        pairs_in_set=len(pairs),
        dtype=policy.dtype_name,
        device=str(policy.device),
        run=options.run,
        loss=list(options.loss),
        beta=options.beta,
        loss_settings={name: getattr(options, name) for name in SETTINGS},
        elapsed_s=elapsed_s,
        pairs_per_s=num_pairs / elapsed_s,
        peak_bytes=peak_bytes(policy.device),
        output=options.output,
        **measured,
    )


def _log_trained_pairs(options: EvalOptions, cache: Cache, pairs: PairSet, log: Log) -> None:
    """Log a remark if the model's run trained on some of the pairs, if the cache still has its training
    pairs.
    """
    config = read_run(Path(options.run)) if options.run else None
    if config is None or Path(options.model).resolve().parent != Path(str(options.run)).resolve():
        return
    name, digest = (config["resolved"].get(key) for key in ("pairs", "pairs_digest"))
    if not name or not cache.holds_pairs(name):
        return
    trained = cache.pairs(name)
    if trained.manifest["pairs_digest"] != digest:
        return
    fraction = config["eval_fraction"] or 0.0
    if shared := count_shared(trained, pairs, fraction=fraction, seed=config["seed"]):
        log(
            f"{shared:,} of {len(pairs):,} pairs have prompts that {options.run} was trained on: their "
            "accuracy and margins are not those of new prompts."
        )


def _pairs_at_once(run: str | None, objective: Objective, log: Log) -> int | None:
    """The number of pairs over which the evaluations of the run computed losses at a time; None without a
    run.
    """
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
