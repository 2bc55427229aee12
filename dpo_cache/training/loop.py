"""store -> lm -> optimizer: the policy-only loop. No reference model is loaded, and no data set read."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpo_cache.errors import TrainingError
from dpo_cache.lm.adapter import describe
from dpo_cache.lm.device import choose_device, deterministic_algorithms, peak_bytes
from dpo_cache.lm.linear import CLEARLY_WORTH, use_fast_linear
from dpo_cache.lm.offload import offload_activations
from dpo_cache.lm.quantization import num_values
from dpo_cache.lm.routing import router_coefficient
from dpo_cache.options import number_or_auto
from dpo_cache.store import open_cache
from dpo_cache.train_options import TrainOptions, with_config
from dpo_cache.training.batches import count_shared, longest_pairs, stream_pairs
from dpo_cache.training.card import library_versions, model_card
from dpo_cache.training.checkpoint import Progress, find_checkpoints, read_progress, restore_optimizer, save_checkpoint
from dpo_cache.training.evaluations import Best, schedule_of
from dpo_cache.training.folder import (
    check_config,
    check_disk,
    check_output,
    discard,
    drop_best,
    find_start,
    read_resolved,
    save_best,
    save_model,
    write_config,
)  # fmt: skip
from dpo_cache.training.freeing import FreedGradients
from dpo_cache.training.metrics import Metrics, MetricsFile, PairMetrics
from dpo_cache.training.objective import objective_of
from dpo_cache.training.opening import open_pairs, open_policy
from dpo_cache.training.optimizers import make_optimizer
from dpo_cache.training.passes import Passes
from dpo_cache.training.report import Clock, TrainReport
from dpo_cache.training.samples import open_sampler
from dpo_cache.training.schedule import learning_rate
from dpo_cache.training.signs import Signs
from dpo_cache.training.step_zero import StepZero, expectation_of
from dpo_cache.training.thrift import Thrift
from dpo_cache.training.trackers import check_trackers, open_trackers
from dpo_cache.types import ScoredPair

OnMetrics = Callable[[dict[str, Any]], None]
OnCheckpoint = Callable[[Path], None]
Say = Callable[[str], None]


def train(
    cache: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    on_metrics: OnMetrics | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    say: Say | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> TrainReport:
    """Fine-tune a policy on a pair set of the cache, against the reference log-probs stored there.

    Keyword arguments are the fields of `TrainOptions`; those not given come from the file `config`, if that is. Callbacks:

    - `on_metrics` gets each line of metrics.jsonl once it is written, with `total_steps` and `left_s` (seconds, or None) added;
    - `on_checkpoint` the folder of each checkpoint once it is published;
    - `say` each remark (default: the package's logger);
    - `should_stop` is asked after every step, and when it says yes the state is saved, to be resumed.

    What a callback raises ends the run and is passed on; what was saved stays. Raises `DpoCacheError`. The model lies in
    `output/model`, the metrics in `output/metrics.jsonl`. With `dry_run` nothing is written.
    """
    given = {**options, **{name: os.fspath(value) for name, value in (("cache", cache), ("output", output)) if value is not None}}
    chosen = TrainOptions(**with_config(given))
    nothing: Callable[[Any], None] = lambda _: None  # noqa: E731
    run = _Run(chosen, on_metrics or nothing, on_checkpoint or nothing, say or logging.getLogger("dpo_cache").warning)
    with deterministic_algorithms(chosen.deterministic):
        return run.try_step() if chosen.dry_run else run.train(should_stop or (lambda: False))


class _Run:
    """One training run: everything is opened and checked before the output folder is touched."""

    def __init__(self, options: TrainOptions, on_metrics: OnMetrics, on_checkpoint: OnCheckpoint, say: Say):
        self.options, self.on_metrics, self.on_checkpoint, self.say = options, on_metrics, on_checkpoint, say
        self.started = time.perf_counter()
        self.output = Path(options.output)
        check_trackers(options.log_to)
        self.checkpoint = find_start(self.output, say, resume=options.resume)
        self.progress = read_progress(self.checkpoint) if self.checkpoint else Progress()
        self.device = choose_device(options.device)
        self.data = open_pairs(options, open_cache(options.cache))
        self.policy = open_policy(options, self.data, self.device, self.checkpoint)
        self.model = self.policy.model
        self.num_parameters = sum(map(num_values, self.model.parameters()))
        self.num_trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self.linear = self._choose_linear()
        steps_per_epoch = math.ceil(self.data.num_pairs / options.batch_size)
        self.total_steps = options.max_steps or math.ceil(options.epochs * steps_per_epoch - 1e-9)
        self.evaluates = schedule_of("--eval-every", options.eval_every, steps_per_epoch)
        self.saves = schedule_of("--save-every", options.save_every, steps_per_epoch)
        self.best = Best(**(self.progress.best or {"measure": options.best}))
        micro_tokens, mode = number_or_auto("--micro-tokens", options.micro_tokens), options.gradient_checkpointing
        self.thrift = Thrift(self.model, micro_tokens, mode, say, is_deterministic=options.deterministic)
        if self.progress.thrift:
            self.thrift.restore(self.progress.thrift)
        if options.offload_activations:
            offload_activations(self.model, say)
        self.optimizer = make_optimizer(
            self.model, options.optimizer, lr=options.lr, weight_decay=options.weight_decay, rounding=options.rounding, seed=options.seed
        )
        if self.checkpoint:
            restore_optimizer(self.checkpoint, self.optimizer)
        self.freed = FreedGradients(self.optimizer) if options.free_gradients else None
        self.objective = objective_of(options, router_coefficient(self.model, options.router_aux_loss_coef))
        self.passes = Passes(self.policy, self.objective, self.thrift, self._step_zero(), say, self.freed)
        self.signs = Signs(say, is_logistic=self.objective.is_logistic, has_reference=self.objective.has_reference, prefers=self.objective.prefers)
        self.clock = Clock()
        self.step_zero_gap: float | None = None
        self.has_updated = False
        self.metrics_file = MetricsFile(self.output / "metrics.jsonl")
        self.sampler = open_sampler(options.sample, self.data, self.policy, output=self.output, seed=options.seed, say=say)

    # -- the main path ---------------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], bool]) -> TrainReport:
        """Run every step that is left."""
        self._settle_folder()
        try:
            with open_trackers(
                self.options.log_to,
                self.output,
                self._config(),
                log_names=self.options.log_names,
                history=self.metrics_file.lines(),
                is_resumed=self.checkpoint is not None,
                say=self.say,
            ) as self.trackers:
                return self._run_steps(should_stop)
        except BaseException:  # Ctrl-C too: what has not begun leaves nothing behind
            if self.checkpoint is None and not self.has_updated:
                discard(self.output)
            raise

    def _run_steps(self, should_stop: Callable[[], bool]) -> TrainReport:
        first, before = self.metrics_file.first("loss"), self.metrics_file.first("eval/loss")  # of the part before a resumption
        last = None
        if self.checkpoint is None:
            before = self._evaluate()
            if self.passes.step_zero is not None:
                self.passes.step_zero.begin_training()
        after = before
        for pairs in self._steps():
            last = self._step(pairs)
            first = first or last
            step, is_last = self.progress.step, self.progress.step == self.total_steps
            if is_last or self.evaluates.is_due(step):
                after = self._evaluate() or after
                self._keep_best(after)
            if self._is_out_of_patience():
                break
            stops = not is_last and should_stop()
            if stops or (self.saves.is_due(step) and not is_last):
                self._save_checkpoint()
            if stops:
                self.trackers.state = "stopped"
                return self._report(first, last, before, None, finished=False)
        return self._finish(first, last, before, after)

    def try_step(self) -> TrainReport:
        """Two whole steps on the longest pairs, for their memory; nothing is written."""
        check_output(self.output)
        self._check_disk()
        self._remark()
        pairs = longest_pairs(self.data.pairs, self.data.selected, self.options.batch_size)
        for number in (1, 2):  # the optimizer's state is there from the first update on, and so beside activations in the second
            self.progress = replace(self.progress, step=number)
            step = self._update(pairs)
        self.on_metrics({**step, "total_steps": self.total_steps, "left_s": None})
        return self._report(step, step, None, None, finished=False)

    def _finish(self, first: Metrics | None, last: Metrics | None, before: Metrics | None, after: Metrics | None) -> TrainReport:
        """Save the model: the last one or, with --patience, the best."""
        self._check_weights("no model")
        is_best_elsewhere = self.best.step not in (None, self.progress.step)
        takes_best = bool(self.options.patience) and is_best_elsewhere
        if not self.best.is_better_than(before):
            self.say("no evaluation was better than the one before training.")
        if takes_best:
            after = self.metrics_file.last("eval/loss", step=self.best.step)
        card = self._card(self.best.step if takes_best and self.best.step else self.progress.step, after)
        save_model(self.output, self.policy, card, takes_best=takes_best, is_merged=self.options.merge_adapter)
        if takes_best or not is_best_elsewhere:
            drop_best(self.output)  # it is the one in model/
        return self._report(first, last, before, after, finished=True)

    # -- steps -----------------------------------------------------------------------------------------

    def _settle_folder(self) -> None:
        """Begin the run's folder, or take it up at the checkpoint."""
        if self.checkpoint:
            check_config(self.output, self._config())
            self.metrics_file.keep_until(self.progress.step)
            if self.sampler:
                self.sampler.file.keep_until(self.progress.step)
        else:
            self._check_disk()
            discard(self.output)  # of a run that was cut off before its first checkpoint
            write_config(self.output, self._config())
        self._remark()

    def _check_disk(self) -> None:
        options = self.options
        num_checkpoints, keeps_best = options.keep if options.save_every else 0, options.eval_every is not None
        check_disk(self.output, self.model, num_checkpoints=num_checkpoints, keeps_best=keeps_best, is_merged=options.merge_adapter)

    def _remark(self) -> None:
        """Say what a user should know before the first step."""
        if self.policy.attention.name == "rows":
            self.say(f"{type(self.model).__name__} is trained on plain padded rows, which is slower: {self.policy.attention.reason}.")
        if self.checkpoint is None and not any(self._lr(step) for step in range(min(self.total_steps, 1000))):
            self.say(f"nothing will be learned: the warm-up (--warmup-ratio {self.options.warmup_ratio}) takes all {self.total_steps} steps.")
        periods = {"--eval-every": (self.options.eval_every, self.evaluates), "--save-every": (self.options.save_every, self.saves)}
        for flag, (value, schedule) in periods.items():
            if value is not None and not schedule.count(1, self.total_steps):
                self.say(f"{flag} {value} never comes about in {self.total_steps} steps.")
        if self.data.eval_pairs is not None and self.data.eval_pairs is not self.data.pairs:
            shared = count_shared(self.data.pairs, self.data.eval_pairs)
            if shared:
                self.say(f"{shared:,} of {len(self.data.eval_pairs):,} evaluation pairs stand in the training pairs, too: those are not held out.")

    def _steps(self) -> Iterator[list[ScoredPair]]:
        """The pairs of each step that is left, epoch after epoch; the last step of an epoch may be smaller."""
        options = self.options
        while self.progress.step < self.total_steps:
            stream = stream_pairs(
                self.data.pairs,
                self.data.selected,
                shuffle=options.shuffle,
                seed=options.seed,
                epoch=self.progress.epoch,
                skip=self.progress.pairs_seen,
            )
            while self.progress.step < self.total_steps and (pairs := list(islice(stream, options.batch_size))):
                self.progress = replace(self.progress, step=self.progress.step + 1, pairs_seen=self.progress.pairs_seen + len(pairs))
                yield pairs
            if self.progress.step < self.total_steps:
                self.progress = replace(self.progress, epoch=self.progress.epoch + 1, pairs_seen=0)

    def _step(self, pairs: list[ScoredPair]) -> Metrics:
        """One update, written down."""
        metrics = self._update(pairs)
        self.clock.note_step(metrics["num_pairs"] / metrics["pairs_per_s"])
        self.signs.note(metrics)
        return self._record(metrics)

    def _update(self, pairs: list[ScoredPair]) -> Metrics:
        """One update. The loss is the mean over the step's pairs, however they are split into forests."""
        self._check_base(pairs)
        started = time.perf_counter()
        lr = self._lr(self.progress.step - 1)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        metrics, num_tokens = self.passes.gradient(pairs)
        self._end_step_zero()
        if self.freed:
            has_changed, grad_norm = self.freed.has_begun, float(self.freed.end_step())
        else:
            has_changed, grad_norm = False, float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf))
        means = metrics.means()
        if not math.isfinite(means["loss"]) or not math.isfinite(grad_norm):
            raise self._not_finite(pairs, means["loss"], grad_norm, has_changed=has_changed)
        if not self.freed:
            self.optimizer.step()
        self.has_updated = True
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": self.progress.step,
            "epoch": round(self.progress.epoch + self.progress.pairs_seen / self.data.num_pairs, 4),
            **means,
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "pairs_per_s": len(pairs) / (time.perf_counter() - started),
            "peak_bytes": peak_bytes(self.device),
        }

    def _not_finite(self, pairs: list[ScoredPair], loss: float, grad_norm: float, *, has_changed: bool) -> TrainingError:
        """The error that names the rows whose loss is not finite, or, where only the gradient is not, all of the step."""
        spoiled = [] if has_changed else self.passes.find_spoiled(pairs)
        rows = spoiled or [scored.pair.row for scored in pairs]
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        which = f"row {shown} of the data made it" if spoiled else f"rows of the data in this step: {shown}"
        saved = find_checkpoints(self.output)
        kept = f" {saved[-1]} holds an earlier state." if saved else ""
        weights = "were updated with it (--free-gradients): the last checkpoint is what counts" if has_changed else "were not updated"
        return TrainingError(
            f"step {self.progress.step}: loss {loss}, gradient norm {grad_norm}; {which}. The weights {weights}.{kept}\n"
            + ("Lower --lr." if self.policy.precision == "fp32" else "Lower --lr, or use --precision fp32.")
        )

    def _evaluate(self) -> Metrics | None:
        """Means over the evaluation pairs under the policy as it is, against the cached reference; None where there are none."""
        if self.data.eval_pairs is None:
            return None
        started, metrics = time.perf_counter(), PairMetrics()
        stream = stream_pairs(self.data.eval_pairs, self.data.eval_selected, shuffle=False, seed=0, epoch=0)
        at_once = self.options.batch_size if self.objective.needs_whole_step else 64
        while pairs := list(islice(stream, at_once)):
            values = self.passes.values(pairs)
            if not math.isfinite(values.means()["loss"]):
                rows = ", ".join(map(str, self.passes.find_spoiled(pairs)[:8]))
                raise TrainingError(
                    f"the evaluation after step {self.progress.step} gives a loss that is not finite, by row {rows} of the data.\n"
                    "No model was saved. Lower --lr."
                )
            metrics.merge(values)
            if self.passes.step_zero is not None:
                self.passes.step_zero.stop_if_wrong()
        means = metrics.means()
        if self.sampler:
            self.sampler.write(self.progress.step)
        self.clock.note_evaluation(time.perf_counter() - started)
        return self._record({"step": self.progress.step, **{f"eval/{name}": value for name, value in means.items()}})

    # -- step zero -------------------------------------------------------------------------------------

    def _step_zero(self) -> StepZero | None:
        """What looks on until the first update; a policy that was trained before repeats nothing."""
        if self.checkpoint or self.options.step_zero == "off":
            return None
        return StepZero(expectation_of(self.policy, self.data, self.options), self.options.step_zero)

    def _check_base(self, pairs: list[ScoredPair]) -> None:
        """With its adapter switched off, a policy that was trained before is still the reference."""
        if self.has_updated or not self.policy.base_is_reference or self.policy.is_reference or self.options.step_zero == "off":
            return
        known = expectation_of(self.policy, self.data, self.options)
        expectation = replace(known, is_reference=True, differing=(), what="the policy with its adapter switched off")
        self.say(self.passes.check_base(pairs, StepZero(expectation, self.options.step_zero)))

    def _end_step_zero(self) -> None:
        """Say what the first step has shown; the first update makes the policy another model."""
        if self.passes.step_zero is not None:
            self.say(self.passes.step_zero.conclude())
            self.step_zero_gap = self.passes.step_zero.largest_gap
            self.passes.step_zero = None

    # -- what is kept ----------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        self._check_weights("no checkpoint")
        self.metrics_file.settle()
        progress = replace(self.progress, thrift=self.thrift.state(), best=self.best.state())
        self.on_checkpoint(save_checkpoint(self.output, self.policy, self.optimizer, progress, keep=self.options.keep))

    def _keep_best(self, evaluation: Metrics | None) -> None:
        """Keep the policy of the best evaluation so far, unless it will be the one in model/ anyway."""
        if evaluation is None or not self.best.note(evaluation):
            return
        if self.options.eval_every is not None and self.progress.step != self.total_steps:
            found = {name: value for name, value in self.best.state().items() if name != "num_worse"}
            save_best(self.output, self.policy, found, self._card(self.progress.step, evaluation))

    def _check_weights(self, what: str) -> None:
        """Raise `TrainingError` before weights that are not finite take the place of good ones."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingError(f"step {self.progress.step}: the update left weights that are not finite; {what} was saved.\nLower --lr.")

    def _is_out_of_patience(self) -> bool:
        return self.options.patience is not None and self.best.num_worse >= self.options.patience and self.progress.step < self.total_steps

    def _choose_linear(self) -> str:
        """Which library multiplies: as before in a resumed run, by a rule instead of a measurement under --deterministic."""
        before = read_resolved(self.output).get("linear", "torch") == "onednn" if self.checkpoint else None
        decided = True if before is None and self.options.deterministic else before
        return "onednn" if use_fast_linear(self.model, worth=CLEARLY_WORTH, decided=decided) else "torch"

    def _lr(self, step: int) -> float:
        options = self.options
        return learning_rate(step, self.total_steps, peak=options.lr, schedule=options.lr_schedule, warmup_ratio=options.warmup_ratio)

    # -- reporting -------------------------------------------------------------------------------------

    def _record(self, metrics: Metrics) -> Metrics:
        self.metrics_file.append(metrics)
        self.trackers.log(metrics)
        step = self.progress.step
        num_evaluations = self.evaluates.count(step + 1, self.total_steps) if self.data.eval_pairs is not None else 0
        left_s = self.clock.left_s(self.total_steps - step, num_evaluations)
        self.on_metrics({**metrics, "total_steps": self.total_steps, "left_s": left_s})
        return metrics

    def _config(self) -> dict[str, Any]:
        """Every option, and what became of the defaults."""
        return {**asdict(self.options), "resolved": self._resolved()}

    def _card(self, step: int, evaluation: Metrics | None) -> str:
        """The model card of the policy as it was after a step."""
        lines, config = self.metrics_file, self._config()
        return model_card(
            config,
            self.data.pairs.manifest,
            self.data.reference,
            before=lines.first("eval/loss"),
            after=evaluation,
            first=lines.first("loss"),
            last=lines.last("loss", step=step),
            num_steps=step,
            versions=library_versions(config),
        )

    def _resolved(self) -> dict[str, Any]:
        return {
            "model": self.policy.location,
            "adapter": describe(self.policy.adapted) if self.policy.adapted else None,
            "base_weights": self.policy.base_weights,
            "reference": self.data.pairs.reference_id,
            "cache": self.options.cache,
            "pairs": self.data.pairs.name,
            "eval_pairs": self.data.eval_pairs.name if self.data.eval_pairs is not None and self.options.eval_pairs else None,
            "pairs_digest": self.data.pairs.manifest["pairs_digest"],
            "num_pairs": self.data.num_pairs,
            "num_eval_pairs": int(self.data.eval_selected.sum()),
            "total_steps": self.total_steps,
            "attention": self.policy.attention.name,
            "precision": self.policy.precision,
            "device": str(self.device),
            "micro_tokens": self.thrift.micro_tokens,
            "gradient_checkpointing": self.thrift.mode,
            "linear": self.linear,
            "router_coefficient": self.objective.router_coefficient,
        }

    def _report(self, first: Metrics | None, last: Metrics | None, before: Metrics | None, after: Metrics | None, *, finished: bool) -> TrainReport:
        has_best = (self.output / "best").exists() and not self.options.dry_run
        return TrainReport(
            output=str(self.output),
            model=None if self.options.dry_run else str(self.output / "model"),
            num_steps=self.progress.step,
            num_pairs=self.data.num_pairs,
            finished=finished,
            step_zero_gap=self.step_zero_gap,
            first=first,
            last=last,
            eval_before=before,
            eval_after=after,
            elapsed_s=time.perf_counter() - self.started,
            peak_bytes=peak_bytes(self.device),
            num_trained=self.num_trained,
            num_parameters=self.num_parameters,
            best=None if self.best.step is None else self.best.state(),
            best_model=str(self.output / "best") if has_best else None,
            stopped_by_patience=finished and self.progress.step < self.total_steps,
            is_dry_run=self.options.dry_run,
            resolved=self._resolved(),
        )
