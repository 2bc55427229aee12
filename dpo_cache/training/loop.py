"""store -> lm -> optimizer: the policy-only loop. No reference model is loaded, and no data set read."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpo_cache.errors import TrainingError
from dpo_cache.lm.device import choose_device, peak_bytes
from dpo_cache.lm.linear import CLEARLY_WORTH, use_fast_linear
from dpo_cache.lm.offload import offload_activations
from dpo_cache.lm.routing import router_coefficient
from dpo_cache.options import number_or_auto
from dpo_cache.store import open_cache
from dpo_cache.train_options import TrainOptions
from dpo_cache.training.batches import stream_pairs
from dpo_cache.training.checkpoint import Progress, read_progress, restore_optimizer, save_checkpoint
from dpo_cache.training.folder import check_config, check_disk, discard, find_start, read_resolved, save_model, write_config
from dpo_cache.training.freeing import FreedGradients
from dpo_cache.training.metrics import Metrics, MetricsFile, PairMetrics
from dpo_cache.training.objective import objective_of
from dpo_cache.training.opening import open_pairs, open_policy
from dpo_cache.training.optimizers import make_optimizer
from dpo_cache.training.passes import Passes
from dpo_cache.training.schedule import learning_rate
from dpo_cache.training.step_zero import StepZero
from dpo_cache.training.thrift import Thrift
from dpo_cache.types import ScoredPair

OnMetrics = Callable[[Metrics], None]
Say = Callable[[str], None]


@dataclass
class TrainReport:
    """What `train` did."""

    output: str
    model: str
    num_steps: int
    num_pairs: int
    finished: bool  # False: stopped early, to be resumed
    step_zero_gap: float | None  # nats; None for a resumed run
    first: Metrics | None
    last: Metrics | None
    eval_before: Metrics | None
    eval_after: Metrics | None
    elapsed_s: float
    peak_bytes: int


def train(
    cache: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    on_metrics: OnMetrics | None = None,
    say: Say | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> TrainReport:
    """Fine-tune a policy on a pair set of the cache, against the reference log-probs stored there.

    Keyword arguments are the fields of `TrainOptions`. `on_metrics` gets each line of metrics.jsonl as it
    is written, with `total_steps` added; `say` each remark (default: the package's logger); `should_stop`
    is asked after every step, and when it says yes the state is saved, to be resumed.

    Raises `DpoCacheError`. The model lies in `output/model`, the metrics in `output/metrics.jsonl`.
    """
    chosen = TrainOptions(cache=os.fspath(cache), output=os.fspath(output), **options)
    run = _Run(chosen, on_metrics or (lambda _: None), say or logging.getLogger("dpo_cache").warning)
    return run.train(should_stop or (lambda: False))


class _Run:
    """One training run: everything is opened and checked before the output folder is touched."""

    def __init__(self, options: TrainOptions, on_metrics: OnMetrics, say: Say):
        self.options, self.on_metrics, self.say = options, on_metrics, say
        self.started = time.perf_counter()
        self.output = Path(options.output)
        self.checkpoint = find_start(self.output, say, resume=options.resume)
        self.progress = read_progress(self.checkpoint) if self.checkpoint else Progress()
        self.device = choose_device(options.device)
        self.data = open_pairs(options, open_cache(options.cache))
        self.policy = open_policy(options, self.data, self.device, self.checkpoint)
        if self.policy.differing:
            self.say("the policy starts as another model than the reference; they differ in " + "; ".join(self.policy.differing) + ".")
        self.model = self.policy.model
        before = read_resolved(self.output).get("linear", "torch") == "onednn" if self.checkpoint else None
        self.linear = "onednn" if use_fast_linear(self.model, worth=CLEARLY_WORTH, decided=before) else "torch"
        self.total_steps = options.max_steps or math.ceil(options.epochs * math.ceil(self.data.num_pairs / options.batch_size))
        self.thrift = Thrift(self.model, number_or_auto("--micro-tokens", options.micro_tokens), options.gradient_checkpointing, say)
        if options.offload_activations:
            offload_activations(self.model, say)
        self.optimizer = make_optimizer(
            self.model, options.optimizer, lr=options.lr, weight_decay=options.weight_decay, rounding=options.rounding, seed=options.seed
        )
        if self.checkpoint:
            restore_optimizer(self.checkpoint, self.optimizer)
        self.freed = FreedGradients(self.optimizer) if options.free_gradients else None
        step_zero = StepZero(
            same_model=self.policy.is_reference,
            reference_dtype=self.data.reference["identity"]["dtype"],
            imported=self.data.reference["identity"].get("imported"),
            policy_dtype="float32" if self.policy.precision == "fp32" else "bfloat16",
        )
        self.objective = objective_of(options, router_coefficient(self.model, options.router_aux_loss_coef))
        self.passes = Passes(self.policy, self.objective, self.thrift, None if self.checkpoint else step_zero, say, self.freed)
        self.step_zero_gap: float | None = None
        self.has_updated = False
        self.metrics_file = MetricsFile(self.output / "metrics.jsonl")

    # -- the main path ---------------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], bool]) -> TrainReport:
        """Run every step that is left."""
        self._settle_folder()
        try:
            return self._run_steps(should_stop)
        except BaseException:  # Ctrl-C too: what has not begun leaves nothing behind
            if self.checkpoint is None and not self.has_updated:
                discard(self.output)
            raise

    def _run_steps(self, should_stop: Callable[[], bool]) -> TrainReport:
        first, eval_before = self.metrics_file.first("loss"), self.metrics_file.first("eval/loss")  # of the part before a resumption
        last = None
        if self.checkpoint is None:
            eval_before = self._evaluate()
        eval_after = eval_before
        for pairs in self._steps():
            last = self._step(pairs)
            first = first or last
            step, is_last = self.progress.step, self.progress.step == self.total_steps
            if is_last or (self.options.eval_every and step % self.options.eval_every == 0):
                eval_after = self._evaluate() or eval_after
            stops = not is_last and should_stop()
            if stops or (self.options.save_every and step % self.options.save_every == 0 and not is_last):
                save_checkpoint(self.output, self.model, self.policy.tokenizer, self.optimizer, self.progress)
            if stops:
                return self._report(first, last, eval_before, None, finished=False)
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingError(f"step {self.total_steps}: the update left weights that are not finite; no model was saved.\nLower --lr.")
        save_model(self.output, self.model, self.policy.tokenizer)
        return self._report(first, last, eval_before, eval_after, finished=True)

    def _settle_folder(self) -> None:
        """Begin the run's folder, or take it up at the checkpoint."""
        if self.checkpoint:
            check_config(self.output, self._config())
            self.metrics_file.keep_until(self.progress.step)
        else:
            check_disk(self.output, self.model, saves_checkpoints=bool(self.options.save_every))
            write_config(self.output, self._config())
        if self.policy.attention.name == "rows":
            self.say(f"{type(self.model).__name__} is trained on plain padded rows, which is slower: {self.policy.attention.reason}.")
        if self.checkpoint is None and not any(self._lr(step) for step in range(min(self.total_steps, 1000))):
            self.say(f"nothing will be learned: the warm-up (--warmup-ratio {self.options.warmup_ratio}) takes all {self.total_steps} steps.")

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
        """One update. The loss is the mean over the step's pairs, however they are split into forests."""
        started = time.perf_counter()
        lr = self._lr(self.progress.step - 1)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        metrics, num_tokens = self.passes.gradient(pairs)
        self._end_step_zero()
        if self.freed:
            has_changed, grad_norm = self.freed.has_begun, self.freed.end_step()
        else:
            has_changed, grad_norm = False, torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf)
        means = metrics.means()
        if not math.isfinite(means["loss"]) or not math.isfinite(float(grad_norm)):
            rows = ", ".join(str(scored.pair.row) for scored in pairs[:8])
            raise TrainingError(
                f"step {self.progress.step}: loss {means['loss']}, gradient norm {float(grad_norm)}; "
                f"the weights were {'updated with it (--free-gradients): the last checkpoint is what counts' if has_changed else 'not updated'}.\n"
                f"Rows of the data in this step: {rows}{', …' if len(pairs) > 8 else ''}. Lower --lr, or use --precision fp32."
            )
        if not self.freed:
            self.optimizer.step()
        self.has_updated = True
        self.optimizer.zero_grad(set_to_none=True)
        elapsed_s = time.perf_counter() - started
        return self._record(
            {
                "step": self.progress.step,
                "epoch": round(self._epochs_done(), 4),
                **means,
                "grad_norm": float(grad_norm),
                "lr": lr,
                "num_tokens": num_tokens,
                "pairs_per_s": len(pairs) / elapsed_s,
                "peak_bytes": peak_bytes(self.device),
            }
        )

    def _end_step_zero(self) -> None:
        """Say what the first step has shown; the first update makes the policy another model."""
        if self.passes.step_zero is not None:
            self.say(self.passes.step_zero.describe())
            self.step_zero_gap = self.passes.step_zero.largest_gap
            self.passes.step_zero = None

    def _evaluate(self) -> Metrics | None:
        """Means over the evaluation pairs under the policy as it is; None where there are none."""
        if self.data.eval_pairs is None:
            return None
        metrics = PairMetrics()
        stream = stream_pairs(self.data.eval_pairs, self.data.eval_selected, shuffle=False, seed=0, epoch=0)
        at_once = self.options.batch_size if self.objective.needs_whole_step else 64
        while pairs := list(islice(stream, at_once)):
            metrics.merge(self.passes.values(pairs))
        means = metrics.means()
        if not math.isfinite(means["loss"]):
            raise TrainingError(f"the evaluation after step {self.progress.step} gives the loss {means['loss']}; no model was saved.\nLower --lr.")
        return self._record({"step": self.progress.step, **{f"eval/{name}": value for name, value in means.items()}})

    def _lr(self, step: int) -> float:
        options = self.options
        return learning_rate(step, self.total_steps, peak=options.lr, schedule=options.lr_schedule, warmup_ratio=options.warmup_ratio)

    # -- reporting -------------------------------------------------------------------------------------

    def _record(self, metrics: Metrics) -> Metrics:
        self.metrics_file.append(metrics)
        self.on_metrics({**metrics, "total_steps": self.total_steps})
        return metrics

    def _config(self) -> dict[str, Any]:
        """Every option, and what became of the defaults."""
        return {
            **asdict(self.options),
            "resolved": {
                "model": self.policy.location,
                "reference": self.data.pairs.reference_id,
                "pairs": self.data.pairs.name,
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
            },
        }

    def _report(self, first: Metrics | None, last: Metrics | None, before: Metrics | None, after: Metrics | None, *, finished: bool) -> TrainReport:
        return TrainReport(
            output=str(self.output),
            model=str(self.output / "model"),
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
        )

    def _epochs_done(self) -> float:
        return self.progress.epoch + self.progress.pairs_seen / self.data.num_pairs
