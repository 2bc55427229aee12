"""store -> lm -> optimizer: the policy-only loop. No reference model is loaded, and no data set read."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import ModelError, NotInCacheError, TrainingError
from dpo_cache.lm.device import choose_device, peak_bytes, sum_dtype
from dpo_cache.lm.engine import choose_attention
from dpo_cache.lm.forest import count_forest_tokens
from dpo_cache.lm.identity import checkpoint_files, computing_fields, weights_digest
from dpo_cache.lm.load import load_config, load_model
from dpo_cache.lm.policy import checkpoint_layers, completion_logps
from dpo_cache.options import TrainOptions, number_or_auto
from dpo_cache.store import Cache, PairSet, open_cache
from dpo_cache.training.batches import completions_of, held_out, split_step, stream_pairs
from dpo_cache.training.checkpoint import Progress, find_checkpoints, read_progress, restore_optimizer, save_checkpoint
from dpo_cache.training.losses import preference_loss
from dpo_cache.training.metrics import Metrics, MetricsFile, PairMetrics
from dpo_cache.training.schedule import learning_rate
from dpo_cache.training.step_zero import StepZero
from dpo_cache.types import ScoredPair

OnMetrics = Callable[[Metrics], None]
Say = Callable[[str], None]

# What may differ between a run and its resumption: it changes speed and memory, or what is reported, not the result.
FREE_TO_CHANGE = {"resume", "cache", "output", "device", "micro_tokens", "gradient_checkpointing", "eval_every", "save_every"}


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
    cache: str,
    output: str,
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
    chosen = TrainOptions(cache=cache, output=output, **options)
    run = _Run(chosen, on_metrics or (lambda metrics: None), say or logging.getLogger("dpo_cache").warning)
    return run.train(should_stop or (lambda: False))


class _Run:
    """One training run: everything is opened and checked before the output folder is touched."""

    def __init__(self, options: TrainOptions, on_metrics: OnMetrics, say: Say):
        self.options, self.on_metrics, self.say = options, on_metrics, say
        self.started = time.perf_counter()
        self.output = Path(options.output)
        self.checkpoint = self._find_checkpoint()
        self.progress = read_progress(self.checkpoint) if self.checkpoint else Progress()
        self.device = choose_device(options.device)
        self.cache: Cache = open_cache(options.cache)
        self._open_pairs()
        self._open_policy()
        self.total_steps = options.max_steps or math.ceil(options.epochs * self.selected.sum() / options.batch_size)
        self.metrics_file = MetricsFile(self.output / "metrics.jsonl")

    # -- the main path ---------------------------------------------------------------------------------

    def train(self, should_stop: Callable[[], bool]) -> TrainReport:
        """Run every step that is left."""
        self._write_config()
        self.metrics_file.keep_until(self.progress.step)
        first = last = None
        eval_before = self._evaluate() if self.checkpoint is None else None
        eval_after = eval_before
        for pairs in self._steps():
            last = self._step(pairs)
            first = first or last
            step, is_last = self.progress.step, self.progress.step == self.total_steps
            if is_last or (self.options.eval_every and step % self.options.eval_every == 0):
                eval_after = self._evaluate() or eval_after
            stops = not is_last and should_stop()
            if stops or (self.options.save_every and step % self.options.save_every == 0 and not is_last):
                save_checkpoint(self.output, self.policy, self.optimizer, self.progress)
            if stops:
                return self._report(first, last, eval_before, None, finished=False)
        self._save_model()
        return self._report(first, last, eval_before, eval_after, finished=True)

    def _steps(self):  # type: ignore[no-untyped-def]
        """The pairs of each step that is left, epoch after epoch; the last step of an epoch may be smaller."""
        options = self.options
        while self.progress.step < self.total_steps:
            stream = stream_pairs(
                self.pairs, self.selected, shuffle=options.shuffle, seed=options.seed, epoch=self.progress.epoch, skip=self.progress.pairs_seen
            )
            while self.progress.step < self.total_steps and (pairs := list(islice(stream, options.batch_size))):
                self.progress = replace(self.progress, step=self.progress.step + 1, pairs_seen=self.progress.pairs_seen + len(pairs))
                yield pairs
            if self.progress.step < self.total_steps:
                self.progress = replace(self.progress, epoch=self.progress.epoch + 1, pairs_seen=0)

    def _step(self, pairs: list[ScoredPair]) -> Metrics:
        """One update. The loss is the mean over the step's pairs, however they are split into forests."""
        started = time.perf_counter()
        options, metrics, num_tokens = self.options, PairMetrics(), 0
        for group in split_step(pairs, self.micro_tokens):
            losses = self._group_losses(group, metrics)
            (losses.sum() / len(pairs)).backward()
            num_tokens += count_forest_tokens(completions_of(group))
        if self.progress.step == 1:
            self.say(self.step_zero.describe())
        lr = learning_rate(
            self.progress.step - 1, self.total_steps, peak=options.lr, schedule=options.lr_schedule, warmup_ratio=options.warmup_ratio
        )
        for group_of_parameters in self.optimizer.param_groups:
            group_of_parameters["lr"] = lr
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), options.max_grad_norm or math.inf)
        means = metrics.means()
        if not math.isfinite(means["loss"]) or not math.isfinite(float(grad_norm)):
            rows = ", ".join(str(scored.pair.row) for scored in pairs[:8])
            raise TrainingError(
                f"step {self.progress.step}: loss {means['loss']}, gradient norm {float(grad_norm)}; the weights were not updated.\n"
                f"Rows of the data in this step: {rows}{', …' if len(pairs) > 8 else ''}. Lower --lr, or use --precision fp32."
            )
        self.optimizer.step()
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

    def _group_losses(self, group: Sequence[ScoredPair], metrics: PairMetrics) -> torch.Tensor:
        """Losses of the pairs of one forest, noted in the metrics; checked against the cache before the first update."""
        with self._autocast():
            logps = completion_logps(self.policy, completions_of(group), self.attention)
        reference = self._reference_logps(group)
        if self.checkpoint is None and self.progress.step <= 1:
            self.step_zero.check(logps, reference)
        chosen, rejected = logps.chunk(2)
        reference_chosen, reference_rejected = reference.chunk(2)
        options = self.options
        losses, chosen_rewards, rejected_rewards = preference_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            ipo=options.loss == "ipo",
            reference_free=options.reference_free,
        )
        metrics.add(losses, chosen_rewards, rejected_rewards, chosen, rejected)
        return losses

    def _reference_logps(self, group: Sequence[ScoredPair]) -> torch.Tensor:
        values = [scored.ref_chosen.logps for scored in group] + [scored.ref_rejected.logps for scored in group]
        return torch.tensor(values, dtype=torch.float64).to(dtype=sum_dtype(self.device)).to(self.device)

    @torch.no_grad()
    def _evaluate(self) -> Metrics | None:
        """Means over the evaluation pairs under the policy as it is; None where there are none."""
        if self.eval_pairs is None:
            return None
        metrics = PairMetrics()
        stream = stream_pairs(self.eval_pairs, self.eval_selected, shuffle=False, seed=0, epoch=0)
        while pairs := list(islice(stream, 64)):
            for group in split_step(pairs, self.micro_tokens):
                self._group_losses(group, metrics)
        return self._record({"step": self.progress.step, **{f"eval/{name}": value for name, value in metrics.means().items()}})

    # -- opening ---------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from. Raises `TrainingError` for a folder that is in use, or has nothing to resume."""
        if not self.options.resume:
            if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
                raise TrainingError(f"{self.output}: not an empty folder.\nGo on with --resume, or choose another --output.")
            return None
        checkpoints = find_checkpoints(self.output)
        if checkpoints:
            return checkpoints[-1]
        if (self.output / "model").exists():
            raise TrainingError(f"{self.output}: this run is finished; its model lies in {self.output / 'model'}.\nChoose another --output to train again.")
        raise TrainingError(f"{self.output}: no checkpoint to resume from.\nRun without --resume, and with --save-every N to have some.")

    def _open_pairs(self) -> None:
        options, cache = self.options, self.cache
        self.pairs: PairSet = cache.pairs(options.pairs) if options.pairs else _only_pair_set(cache, options.eval_pairs)
        reference_id = self.pairs.reference_id
        if options.reference and cache.find_reference(options.reference) != reference_id:
            raise TrainingError(
                f"pair set {self.pairs.name} was scored by reference {reference_id[:12]}, not by {options.reference}.\n"
                "Leave --reference out, or run `dpo-cache precompute` with that model and another --name."
            )
        self.reference = cache.read_reference(reference_id)
        self.selected = np.ones(len(self.pairs), bool)
        self.eval_pairs: PairSet | None = None
        self.eval_selected = np.ones(0, bool)
        if options.eval_pairs:
            self.eval_pairs = cache.pairs(options.eval_pairs)
            self.eval_selected = np.ones(len(self.eval_pairs), bool)
            if self.eval_pairs.reference_id != reference_id:
                raise TrainingError(
                    f"{self.eval_pairs.name} was scored by reference {self.eval_pairs.reference_id[:12]}, {self.pairs.name} by {reference_id[:12]}.\n"
                    "Run `dpo-cache precompute` on the evaluation data with the same model, dtype and cache."
                )
        elif options.eval_fraction:
            self.eval_pairs, self.eval_selected = self.pairs, held_out(self.pairs, options.eval_fraction, options.seed)
            self.selected = ~self.eval_selected
            if not self.selected.any() or not self.eval_selected.any():
                raise TrainingError(f"--eval-fraction {options.eval_fraction} leaves one side without pairs (of {len(self.pairs)}).\nTry another fraction.")

    def _open_policy(self) -> None:
        options, source = self.options, self.reference["provenance"]
        self.model = options.model or source["model"]
        revision = None if options.model else source.get("revision")
        if options.model is None and os.path.isabs(self.model) and not os.path.isdir(self.model):
            raise ModelError(f"the reference's checkpoint {self.model} is gone.\nSay where the policy starts from with --model.")
        self.tokenizer = self._load_tokenizer()
        self.precision = _choose_precision(options.precision, self.device)
        config = load_config(self.model, revision=revision)
        identity = self.reference["identity"]
        same_model = computing_fields(config) == identity["config"] and weights_digest(checkpoint_files(self.model, revision=revision)) == identity["weights"]
        computed_in = "float32" if self.precision == "fp32" else "bfloat16"
        self.step_zero = StepZero(same_model=same_model, reference_dtype=identity["dtype"], policy_dtype=computed_in)
        location = str(self.checkpoint) if self.checkpoint else self.model
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.policy: PreTrainedModel = load_model(location, dtype=dtype, device=self.device, revision=None if self.checkpoint else revision)
        self.attention = choose_attention(self.policy, "auto", max_length=self.pairs.manifest["tokenization"]["max_length"])
        if self.attention.name == "rows":
            self.say(f"{type(self.policy).__name__} is trained on plain padded rows, which is slower: {self.attention.reason}.")
        if options.gradient_checkpointing:
            checkpoint_layers(self.policy)
        self.micro_tokens = number_or_auto("--micro-tokens", options.micro_tokens) or (1024 if self.device.type == "cpu" else 4096)
        self.optimizer = _make_optimizer(self.policy, options, self.device)
        if self.checkpoint:
            restore_optimizer(self.checkpoint, self.policy, self.optimizer)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the ids, to be saved beside the model."""
        made_with = self.pairs.manifest["tokenization"]
        for location in (made_with["tokenizer"], self.model):
            try:
                tokenizer = AutoTokenizer.from_pretrained(location)
            except (OSError, ValueError):
                continue
            tokenizer.chat_template = made_with["chat_template"]
            return tokenizer
        raise ModelError(f"no tokenizer in {made_with['tokenizer']} or {self.model}; the trained model would be saved without one.\nPut its files there.")

    # -- writing ---------------------------------------------------------------------------------------

    def _write_config(self) -> None:
        """RUN/config.json: every option, and what became of the defaults. A resumed run must agree with it."""
        config = {
            **asdict(self.options),
            "resolved": {
                "model": self.model,
                "reference": self.pairs.reference_id,
                "pairs": self.pairs.name,
                "pairs_digest": self.pairs.manifest["pairs_digest"],
                "num_pairs": int(self.selected.sum()),
                "num_eval_pairs": int(self.eval_selected.sum()),
                "total_steps": self.total_steps,
                "attention": self.attention.name,
                "precision": self.precision,
                "device": str(self.device),
                "micro_tokens": self.micro_tokens,
            },
        }
        path = self.output / "config.json"
        if self.checkpoint:
            _check_same_run(json.loads(path.read_text()), config)
            return
        self._check_disk()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {error.strerror or error}.\nChoose another --output.") from error

    def _check_disk(self) -> None:
        model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self.policy.parameters())
        needed = model_bytes * (7 if self.options.save_every else 1)  # a checkpoint holds weights and two moments; two lie there for a moment
        folder = self.output.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise TrainingError(
                f"{self.output}: {needed / 1e9:.1f} GB are needed for the model and its checkpoints, {free / 1e9:.1f} GB are free.\n"
                "Free some space or choose another --output."
            )

    def _save_model(self) -> None:
        """RUN/model, whole or absent; then the checkpoints have served."""
        scratch, target = self.output / ".model.tmp", self.output / "model"
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            self.policy.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            os.rename(scratch, target)
        except OSError as error:
            raise TrainingError(f"cannot save {target}: {error.strerror or error}.\nFree some space, then go on with --resume.") from error
        shutil.rmtree(self.output / "checkpoints", ignore_errors=True)

    def _record(self, metrics: Metrics) -> Metrics:
        self.metrics_file.append(metrics)
        self.on_metrics({**metrics, "total_steps": self.total_steps})
        return metrics

    def _report(self, first: Metrics | None, last: Metrics | None, before: Metrics | None, after: Metrics | None, *, finished: bool) -> TrainReport:
        return TrainReport(
            output=str(self.output),
            model=str(self.output / "model"),
            num_steps=self.progress.step,
            num_pairs=int(self.selected.sum()),
            finished=finished,
            step_zero_gap=self.step_zero.largest_gap if self.step_zero.num_completions else None,
            first=first,
            last=last,
            eval_before=before,
            eval_after=after,
            elapsed_s=time.perf_counter() - self.started,
            peak_bytes=peak_bytes(self.device),
        )

    def _epochs_done(self) -> float:
        return self.progress.epoch + self.progress.pairs_seen / int(self.selected.sum())

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext()


def _only_pair_set(cache: Cache, eval_pairs: str | None) -> PairSet:
    held = cache.pairs(eval_pairs).name if eval_pairs else None
    known = [name for name in cache.pair_sets() if name != held]
    if len(known) != 1:
        raise NotInCacheError(f"{cache}: {'no pair set' if not known else 'several pair sets'} to train on.\nSay which with --pairs: {', '.join(known) or 'there are none'}.")
    return cache.pairs(known[0])


def _choose_precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def _make_optimizer(policy: PreTrainedModel, options: TrainOptions, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; weight decay spares biases and norms."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, fused=device.type in ("cpu", "cuda"))


def _check_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `TrainingError` naming the options that a resumed run changes."""
    fixed = [name for name in now if name not in FREE_TO_CHANGE and name != "resolved"]
    changed = [f"{name}: {before.get(name)} before, {now[name]} now" for name in fixed if before.get(name) != now[name]]
    resolved = ("reference", "pairs_digest", "num_pairs", "total_steps", "precision")
    changed += [
        f"{name}: {before['resolved'][name]} before, {now['resolved'][name]} now" for name in resolved if before["resolved"][name] != now["resolved"][name]
    ]
    if changed:
        raise TrainingError("this run was started otherwise:\n  " + "\n  ".join(changed) + "\nGive the same options, or choose another --output.")
