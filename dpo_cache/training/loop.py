"""store -> lm -> optimizer: the policy-only loop. No reference model is loaded, and no data set is read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cache.files.claim import Claim
from dpo_cache.lm.device import deterministic_algorithms, peak_bytes
from dpo_cache.lm.model.unchanged import one_checkpoint
from dpo_cache.log import Log, keeps_remarks, log_remark, phase
from dpo_cache.losses.metrics import Metrics
from dpo_cache.options.keywords import keywords_of
from dpo_cache.options.train import TrainOptions
from dpo_cache.progress import bars_hidden, show_training, shows_progress
from dpo_cache.training.batches import longest_pairs, stream_pairs
from dpo_cache.training.evaluations import Best
from dpo_cache.training.forecast import forecast
from dpo_cache.training.launch import with_launched_config
from dpo_cache.training.loaded import take_loaded
from dpo_cache.training.output.metrics_file import MetricsFile
from dpo_cache.training.output.report import Clock, TrainReport
from dpo_cache.training.output.run_folder import begin_folder, check_disk, discard, restore_best
from dpo_cache.training.output.run_start import check_output, hold_run, remove_scratch
from dpo_cache.training.output.samples import FILE as SAMPLES
from dpo_cache.training.output.samples import open_sampler
from dpo_cache.training.output.trackers import Trackers, open_trackers
from dpo_cache.training.parallel import parallelize
from dpo_cache.training.ranked_step import RankedStep, make_step
from dpo_cache.training.ranks import open_ranks
from dpo_cache.training.sample import sample_pairs, sample_size
from dpo_cache.training.saving import Saver
from dpo_cache.training.setup import Setup, open_setup
from dpo_cache.training.step_zero import open_base_check, open_step_zero
from dpo_cache.training.warnings import RunWarnings
from dpo_cache.types import ScoredPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnMetrics = Callable[[dict[str, Any]], None]
OnCheckpoint = Callable[[Path], None]


@keywords_of(TrainOptions)
@shows_progress("training", show_training, callback="on_metrics")
@keeps_remarks
@bars_hidden("transformers")
@one_checkpoint()
def train(
    cache: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_metrics: OnMetrics | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    log: Log | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> TrainReport:
    """Fine-tune a policy on a pair set of the cache, against the reference log-probs stored there.

    Options that are not given come from the file `config`, if one is given. `progress=True` shows on stderr
    what the command line shows.

    `model` may be a model that is loaded already. It is trained in place: afterwards it has the weights of
    the last step, in the dtype and on the device of the run, and a new adapter (`lora_r`) stays in it. It
    counts as the reference only if its weights are those of its checkpoint and of the reference; then step
    zero is checked. `tokenizer` is saved with it; default: the one that made the pairs. Callbacks:

    - `on_metrics` gets each line of metrics.jsonl once it is written, with `total_steps` and `left_s`
      (seconds, or None) added;
    - `on_checkpoint` the folder of each checkpoint once it is published;
    - `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too;
    - `should_stop` is called after every step. If it returns True, the state is saved, and the run can be
      resumed.

    In a program that accelerate launch, torchrun or SLURM has started several times, all processes call this
    with the same options and train together; the main one calls the callbacks, and all return its report.

    An exception in a callback ends the run; saved files stay. Raises `DpoCacheError`. The model is saved
    in `output/model`, the metrics in `output/metrics.jsonl`. With `dry_run` nothing is written.
    """
    loaded = take_loaded(model, tokenizer)
    named = {"cache": cache, "output": output, "model": model if loaded is None else loaded.name}
    given = {"launch": None, **options, **{name: value for name, value in named.items() if value is not None}}
    chosen = TrainOptions(**with_launched_config(given, log or log_remark))
    nothing: Callable[[Any], None] = lambda _: None  # noqa: E731
    started = time.perf_counter()
    with open_ranks(chosen) as ranks:
        if not ranks.is_main:  # other ranks write no files, remarks or progress
            on_metrics = on_checkpoint = log = nothing
        log = log or log_remark
        held = (
            hold_run(Path(chosen.output), log, resume=bool(chosen.resume), is_dry_run=chosen.dry_run)
            if ranks.is_main
            else nullcontext()
        )
        opened = open_setup(chosen, log, loaded, ranks)
        with held as claim, opened as setup, deterministic_algorithms(chosen.deterministic):
            run = _Run(setup, on_metrics or nothing, on_checkpoint or nothing, claim, started)
            return run.try_step() if chosen.dry_run else run.train(should_stop or (lambda: False))


class _Run:
    """One training run: its position, its steps and its files."""

    trackers: Trackers  # opened by `train`; a dry run has none

    def __init__(
        self,
        setup: Setup,
        on_metrics: OnMetrics,
        on_checkpoint: OnCheckpoint,
        claim: Claim | None,
        started: float,
    ):
        self.claim = claim  # the claim on the folder; a dry run has none
        self.setup, self.options, self.data, self.policy = setup, setup.options, setup.data, setup.policy
        self.ranks = setup.ranks
        self.on_metrics, self.started = on_metrics, started
        self.position, self.output, self.log = setup.position, setup.output, setup.log
        self.best = Best(**(setup.position.best or {"measure": setup.options.best}))
        policy = parallelize(setup.policy_model(), setup.ranks, is_layer_major=setup.layer_major is not None)
        checked = setup.policy, setup.data, setup.options
        self.step = make_step(
            setup, policy, open_step_zero(*checked, is_resumed=setup.checkpoint is not None)
        )
        self.base_check = open_base_check(*checked)
        objective = setup.objective
        self.warnings = RunWarnings(
            setup.log,
            is_logistic=objective.is_logistic,
            has_reference=objective.has_reference,
            prefers=objective.prefers,
        )
        self.clock = Clock()
        self.newest: list[ScoredPair] = []  # a pair of the last step
        self.metrics_file = MetricsFile(self.output / "metrics.jsonl", has_steps=True)
        self.samples_file = MetricsFile(self.output / SAMPLES)
        files = (self.metrics_file, self.samples_file)
        self.saver = Saver(setup, self.step, files, self.best, on_checkpoint)
        self.sampler = open_sampler(setup, policy)

    # -- the main path ---------------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], bool]) -> TrainReport:
        """Take every remaining step."""
        if self.ranks.is_main:
            self._prepare_folder()
        self.ranks.gather(None)  # wait: the other ranks may read the folder only now
        try:
            with open_trackers(
                self.options.log_to if self.ranks.is_main else (),
                self.output,
                self.setup.config(),
                log_names=self.options.log_names,
                history=self.metrics_file.lines(),
                is_resumed=self.setup.checkpoint is not None and self.ranks.is_main,
                log=self.log,
            ) as self.trackers:
                return self._run_steps(should_stop)
        except BaseException:  # also Ctrl-C: a run without an update leaves no files
            if self.setup.checkpoint is None and not self.step.has_updated and self._has_folder():
                discard(self.output)
            raise

    def _run_steps(self, should_stop: Callable[[], bool]) -> TrainReport:
        if self.setup.checkpoint is None:
            self._evaluate()
            if self.step.step_zero is not None:
                self.step.step_zero.begin_training()
        for pairs in self._steps():
            self.newest = pairs[:1]
            self._step(pairs)
            step, is_last = self.position.step, self.position.step == self.setup.total_steps
            if is_last or self.setup.evaluates.is_due(step):
                self.saver.keep_best(self._evaluate(), step)
            if self._is_out_of_patience():
                break
            stops = not is_last and self.ranks.any(should_stop())
            if stops or (self.setup.saves.is_due(step) and not is_last):
                self.saver.save_checkpoint(self.position)
            if stops:
                self.trackers.state = "stopped"
                return self.ranks.share(self._report(finished=False))
        return self._finish()

    def try_step(self) -> TrainReport:
        """Take two whole steps on the longest pairs, to measure their memory; nothing is written."""
        disk_bytes = 0
        if self.ranks.is_main:
            check_output(self.output)
            disk_bytes = check_disk(self.output, self.policy, self.options)
        self.setup.log_remarks()
        pairs = longest_pairs(self.data.pairs, self.data.selected, self.options.batch_size)
        for number in (1, 2):  # in the second step, the optimizer's state exists next to the activations
            self.position = replace(self.position, step=number)
            metrics = self._update(pairs)
        self.on_metrics({**metrics, "total_steps": 2, "left_s": None})
        found = forecast(self.setup, metrics, pairs, disk_bytes)
        report = replace(self._report(finished=False), first=metrics, last=metrics, eval_before=None)
        return self.ranks.share(replace(report, forecast=found))

    def _finish(self) -> TrainReport:
        if self.ranks.is_main and not self.best.is_better_than(self.metrics_file.first("eval/loss")):
            self.log("no evaluation was better than the one before training.")
        self._check_claim()
        evaluation = self.saver.save_model(self.position.step, self.newest)
        before = self.metrics_file.first("eval/loss") if self.ranks.is_main else None
        self.warnings.conclude(before, evaluation, beta=self.options.beta, lr=self.setup.peak_lr)
        return self.ranks.share(replace(self._report(finished=True), eval_after=evaluation))

    # -- steps -----------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        """Create the run's folder, or cut it back to the checkpoint."""
        self._has_folder()
        self._check_claim()
        checkpoint = self.setup.checkpoint
        if checkpoint is None:
            check_disk(self.output, self.policy, self.options)
            begin_folder(self.output, self.setup.config())
        else:
            remove_scratch(self.output)
            for file in (self.metrics_file, self.samples_file):
                file.keep_until(self.position.step, self.log)
            self.warnings.resume(line for line in self.metrics_file.lines() if "loss" in line)
            if not restore_best(self.output, checkpoint, asdict(self.best)):
                self.log(
                    f"{self.output / 'best'}: the policy of the best evaluation, step {self.best.step}, is "
                    "lost. The run continues; its best is that of the later evaluations."
                )
                self.best.forget()
        self.setup.log_remarks()

    def _steps(self) -> Iterator[list[ScoredPair]]:
        """Yield the pairs of each remaining step; the last step of an epoch may be smaller."""
        options = self.options
        while self.position.step < self.setup.total_steps:
            stream = stream_pairs(
                self.data.pairs,
                self.data.selected,
                shuffle=options.shuffle,
                seed=options.seed,
                epoch=self.position.epoch,
                skip=self.position.pairs_seen,
            )
            while self.position.step < self.setup.total_steps and (
                pairs := list(islice(stream, options.batch_size))
            ):
                self.position = replace(
                    self.position,
                    step=self.position.step + 1,
                    pairs_seen=self.position.pairs_seen + len(pairs),
                )
                yield pairs
            if self.position.step < self.setup.total_steps:
                self.position = replace(self.position, epoch=self.position.epoch + 1, pairs_seen=0)

    def _step(self, pairs: list[ScoredPair]) -> None:
        """Take a step and record its metrics."""
        metrics = self._update(pairs)
        self.clock.steps_s.append(metrics["num_pairs"] / metrics["pairs_per_s"])
        self.warnings.note(metrics)
        self._record(metrics)

    def _update(self, pairs: list[ScoredPair]) -> Metrics:
        """Update the weights once. Returns the metrics of the step."""
        if not self.step.has_updated:
            self._check_start(pairs)
        started, number = time.perf_counter(), self.position.step
        lr = self.setup.lr(number - 1)
        metrics, num_tokens, grad_norm = self.step.take(pairs, number, lr)
        return {
            "step": number,
            "epoch": round(self.position.epoch + self.position.pairs_seen / self.data.num_pairs, 4),
            **metrics.means(),
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "pairs_per_s": len(pairs) / (time.perf_counter() - started),
            "peak_bytes": self._peak_bytes(),
        }

    def _peak_bytes(self) -> int:
        """The largest memory peak of all ranks."""
        return max(self.ranks.gather(peak_bytes(self.setup.device)))

    def _check_start(self, pairs: list[ScoredPair]) -> None:
        """Before the first update, compare pairs from the whole training set with the cache; see `step_zero`.

        The pairs of the first step are compared as well, here or in the step itself. Several
        ranks first try the longest pairs: later, none could run out of memory without the others.
        """
        if isinstance(self.step, RankedStep):
            self.step.try_step(longest_pairs(self.data.pairs, self.data.selected, self.options.batch_size))
        sample: list[ScoredPair] = []
        if (self.step.step_zero or self.base_check) and not self.options.dry_run:
            num_trained = self.setup.total_steps * self.options.batch_size
            sample = sample_pairs(self.data.pairs, self.data.selected, sample_size(num_trained))
        if self.base_check:
            self.log(self.step.check_base([*sample, *pairs], self.base_check))
        if self.step.step_zero and sample:
            self.step.compare(sample)

    @phase("evaluating")
    def _evaluate(self) -> Metrics | None:
        """Evaluate the policy and record the means; None if there are no evaluation pairs."""
        if self.data.eval_pairs is None:
            return None
        started = time.perf_counter()
        means = self.step.evaluate(self.position.step)
        if self.sampler:
            self.sampler.write(self.position.step)
        self.clock.evaluations_s.append(time.perf_counter() - started)
        metrics = {"step": self.position.step, **{f"eval/{name}": value for name, value in means.items()}}
        self._record(metrics)
        return metrics

    def _is_out_of_patience(self) -> bool:
        patience = self.options.patience
        return patience is not None and self.best.num_worse >= patience

    def _check_claim(self) -> None:
        """Raise `TrainingError` if another process has claimed the folder."""
        if self.claim:
            self.claim.check()

    def _has_folder(self) -> bool:
        """Return whether the folder is still claimed by this process, at this moment."""
        if self.claim:
            self.claim.renew()
        return self.ranks.is_main and not (self.claim and self.claim.is_lost)

    # -- reporting -------------------------------------------------------------------------------------

    def _record(self, metrics: Metrics) -> None:
        if not self.ranks.is_main:
            return
        self._check_claim()
        self.metrics_file.append(metrics)
        self.trackers.log(metrics)
        step, total_steps = self.position.step, self.setup.total_steps
        has_evaluations = self.data.eval_pairs is not None
        num_evaluations = self.setup.evaluates.count(step + 1, total_steps) if has_evaluations else 0
        left_s = self.clock.left_s(total_steps - step, num_evaluations)
        self.on_metrics({**metrics, "total_steps": total_steps, "left_s": left_s})

    def _report(self, *, finished: bool) -> TrainReport:
        is_dry_run, lines = self.options.dry_run, self.metrics_file
        has_best = (self.output / "best").exists() and not is_dry_run
        return TrainReport(
            output=str(self.output),
            model=None if is_dry_run else str(self.output / "model"),
            num_steps=self.position.step,
            num_pairs=self.data.num_pairs,
            finished=finished,
            step_zero_gap=self.step.step_zero_gap,
            first=lines.first("loss"),
            last=lines.last("loss"),
            eval_before=lines.first("eval/loss"),
            eval_after=None,
            elapsed_s=time.perf_counter() - self.started,
            peak_bytes=self._peak_bytes(),
            num_trained=self.setup.num_trained,
            num_parameters=self.setup.num_parameters,
            best=None if self.best.step is None else asdict(self.best),
            best_model=str(self.output / "best") if has_best else None,
            stopped_by_patience=finished and self.position.step < self.setup.total_steps,
            is_dry_run=is_dry_run,
            resolved=self.setup.resolved(),
        )
