"""Every option of `train`: name, type, default, unit, help and check, in one place."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from dpo_cache.errors import OptionError
from dpo_cache.options.base import (
    ABOVE_0,
    AT_LEAST_0,
    DEVICES,
    QUANTIZATIONS,
    cache_argument,
    number_or_auto,
    option,
    switch,
)
from dpo_cache.options.losses import LossOptions
from dpo_cache.options.placement import MEMORY, Placement, placement_of

WHOLE_LR = 1e-6  # of all weights
ADAPTER_LR = 1e-5  # its weights are few, and start where the model does not change
LR_SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw-bf16", "adamw-8bit", "adamw-paged", "adamw-8bit-paged", "adafactor")
ROUNDINGS = ("auto", "nearest", "stochastic", "compensated")
RECOMPUTATIONS = ("auto", "none", "cheap", "selective", "full")
PRECISIONS = ("auto", "fp32", "bf16-mixed", "bf16")
PARALLEL = ("ddp", "fsdp")
ON_SHARDS = ("adamw", "adamw-bf16")  # optimizers that update shards of weights as they do the whole
STEP_ZERO = ("auto", "strict", "warn", "off")
BEST = ("loss", "accuracy", "margin")
TEMPLATES = ("pairs", "model")  # or a file
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
LOG_NAMES = ("trl", "original")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LossOptions):
    """Options of `dpo-cache train`; see `dpo_cache.train`."""

    groups: ClassVar[dict[str, str]] = {
        "lora_r": "Adapter and quantization",
        **LossOptions.groups,
        "router_aux_loss_coef": "Loss",
        "epochs": "Optimization",
        "memory": "Memory and speed",
        "parallel": "Several devices",
        "eval_pairs": "Evaluation",
        "save_every": "The run",
    }

    cache: str = cache_argument("Cache with the pair set: a folder or an fsspec URL.")
    output: str = option(
        None, "Folder of the run: config.json, metrics.jsonl, checkpoints/, model/.", required=True
    )
    model: str | None = option(
        None, "Policy to start from: a folder or a Hub id. Default: the reference's own checkpoint."
    )
    pairs: str | None = option(
        None, "Pair set to train on, NAME or NAME/SPLIT. Default: the only one in the cache."
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with --model, and from no other place.", flag="--trust-remote-code"
    )
    chat_template: str = option(
        "pairs",
        "Chat template to save with the trained model: the one the pairs were made with, the model's own, "
        "that in a file, or one of the tokenizer's by its name.",
        metavar="pairs|model|FILE|NAME",
    )
    reference: str | None = option(
        None, "Id (or its first characters) of the reference that the pairs must have been scored by."
    )
    config: str | None = option(
        None,
        "config.json of an earlier run, to start from its options. Options on the command line override it.",
    )
    trl_config: str | None = option(
        None,
        "DPOConfig of TRL, as YAML or JSON, to start from its values. Options on the command line override "
        "it; fields without a counterpart are reported.",
        metavar="FILE",
    )
    lora_r: int | None = option(
        None, "Rank of a LoRA adapter, which is trained over frozen weights.", limit=ABOVE_0
    )
    lora_alpha: float | None = option(
        None,
        "Scale of the LoRA adapter, before it is divided by its rank. Default: twice the rank.",
        limit=ABOVE_0,
    )
    lora_targets: str = option(
        "all-linear", "Layers that get LoRA: all-linear, or names with commas, as in q_proj,v_proj."
    )
    peft_config: str | None = option(
        None, "File with the PEFT config (adapter_config.json) of any other adapter."
    )
    merge_adapter: bool = option(
        False,
        "Merge the adapter into the weights at the end: model/ is a plain model.",
        flag=switch("merge-adapter"),
    )
    quantize: str = option(
        "none",
        "Hold the frozen weights under an adapter in 8 or 4 bits (bitsandbytes).",
        choices=QUANTIZATIONS,
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of a mixture of experts' router loss; 0: none. Default: the model config's.",
        limit=AT_LEAST_0,
    )
    epochs: float = option(1.0, "Passes over the pairs.", limit=ABOVE_0)
    max_steps: int | None = option(None, "Stop after N steps, regardless of --epochs.", limit=ABOVE_0)
    batch_size: int = option(32, "Pairs a step.", limit=ABOVE_0)
    shuffle: bool = option(True, "Shuffle the pairs each epoch.", flag="--shuffle/--no-shuffle")
    lr: float | None = option(
        None, "Peak learning rate. Default: 1e-6, or 1e-5 where an adapter is trained.", limit=ABOVE_0
    )
    lr_schedule: str = option("linear", "Decay of the learning rate after the warm-up.", choices=LR_SCHEDULES)
    warmup_ratio: float = option(
        0.1,
        "Share of the steps over which the learning rate rises from 0; never all of them.",
        limit=(lambda value: 0 <= value <= 1, "0 to 1"),
    )
    warmup_steps: int | None = option(
        None, "Steps of the warm-up, instead of a share of the steps; never all of them.", limit=AT_LEAST_0
    )
    optimizer: str = option(
        "adamw",
        "Optimizer; bf16, 8bit: its state in bfloat16 or 8 bits. paged: an earlier name of "
        "--place optimizer=host,gradients=host.",
        choices=OPTIMIZERS,
    )
    weight_decay: float = option(0.0, "Weight decay.", limit=AT_LEAST_0)
    max_grad_norm: float = option(
        1.0,
        "Clip the gradient to this norm; 0: never.",
        limit=(lambda value: 0 <= value < math.inf, "0 (never clip) or more"),
    )
    memory: str = option(
        "auto",
        "Preset for the device memory of a step: fast (everything on the device), small (layer by layer, "
        "with gradients, optimizer state and layer inputs on the host) or least (weights there, too; no "
        "clipping). auto: the first that fits.",
        choices=MEMORY,
    )
    place: str | None = option(
        None,
        "Entries that change the preset of --memory: weights=device|host|disk, gradients=device|host|none "
        "(none: each layer is updated at once), optimizer=device|host, inputs=device|host, with commas.",
        metavar="NAME=PLACE,...",
    )
    budget_tokens: str = option(
        "auto",
        "Tokens run through the model at once: auto or a number. Changes memory and speed, not the result.",
        old=("micro_tokens",),
    )
    precision: str = option(
        "auto", "auto: bf16-mixed on CUDA GPUs that have it, else fp32.", choices=PRECISIONS
    )
    rounding: str = option(
        "auto", "How --precision bf16 rounds updated weights. auto: stochastic.", choices=ROUNDINGS
    )
    gradient_checkpointing: str = option(
        "auto",
        "Activations computed again in the backward pass: none, those that cost next to nothing (cheap), all "
        "but matrix products (selective), or full.",
        choices=RECOMPUTATIONS,
    )
    offload_activations: bool = option(
        False, "Earlier name of --place inputs=host.", flag=switch("offload-activations")
    )
    free_gradients: bool = option(
        False, "Earlier name of --place gradients=none.", flag=switch("free-gradients")
    )
    device: str = option("auto", "Where to compute. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    parallel: str = option(
        "ddp",
        "How processes share the training, each on its own device: ddp (each has the whole policy) or fsdp "
        "(each has a shard of weights, gradients and optimizer state).",
        choices=PARALLEL,
    )
    launch: int | None = option(
        None,
        "Train with N processes of this machine, one a device. Default: with those that accelerate launch, "
        "torchrun or SLURM has started, or with one.",
        limit=ABOVE_0,
    )
    eval_pairs: str | None = option(None, "Pair set to evaluate on, NAME or NAME/SPLIT.")
    eval_fraction: float | None = option(
        None,
        "Share of the prompts to hold out for evaluation instead, above 0 and below 1.",
        limit=(lambda value: 0 < value < 1, "above 0 and below 1"),
    )
    eval_every: str | None = option(
        None, "Evaluate every N steps, or epochs as in 0.5epochs, besides before and after training."
    )
    best: str = option(
        "loss",
        "Measure of the best evaluation, whose model is kept in best/. --patience uses the same measure.",
        choices=BEST,
    )
    patience: int | None = option(
        None, "Stop after N evaluations in a row that are no better than the best.", limit=ABOVE_0
    )
    sample: int = option(
        0,
        "Let the policy answer N evaluation prompts at each evaluation, into samples.jsonl.",
        limit=AT_LEAST_0,
    )
    save_every: str | None = option(
        None, "Save a checkpoint to resume from every N steps, or epochs as in 1epoch."
    )
    keep: int = option(1, "Keep the last N checkpoints.", limit=ABOVE_0)
    resume: bool | str = option(
        False,
        "Continue a run from its last checkpoint, with the options of its config.json. Without a folder: the "
        "run in --output.",
        metavar="[RUN]",
        value_is_optional=True,
    )
    seed: int = option(
        0,
        "Seed of everything random: the order of pairs, a new adapter, stochastic rounding, samples.",
        limit=AT_LEAST_0,
    )
    deterministic: bool = option(
        False,
        "Two runs of the same options on the same machine give the same bits.",
        flag=switch("deterministic"),
    )
    step_zero: str = option(
        "auto",
        "Check before the first update that the policy repeats the cached log-probs: strict stops the run if "
        "it does not, warn continues. auto: strict if the policy starts as the reference.",
        choices=STEP_ZERO,
    )
    log_to: tuple[str, ...] = option(
        (), f"Tracker to log to, besides metrics.jsonl: {', '.join(TRACKERS)}; may be repeated."
    )
    log_names: str = option(
        "trl",
        "Names of metrics in trackers: TRL's, or those of the original DPO repository.",
        choices=LOG_NAMES,
    )
    dry_run: bool = option(
        False,
        "Resolve every option, take two steps on the longest pairs, report time, memory and disk; write "
        "nothing.",
        flag="--dry-run",
    )

    def check(self) -> None:
        self.check_losses()
        self._require(
            self.eval_pairs is None or self.eval_fraction is None,
            "`eval_pairs` and `eval_fraction`: give one of them.",
        )
        number_or_auto("budget_tokens", self.budget_tokens)
        self._check_adapter()
        self._check_run()

    def check_ranks(self, num_ranks: int) -> None:
        """Raise `OptionError` for options that do not work with so many processes."""
        if num_ranks == 1:
            return
        self._require(
            self.device != "mps",
            f"`device` mps: {num_ranks} processes train on CUDA devices or on the CPU.\nGive another.",
        )
        if self.parallel != "fsdp":
            return
        self._require(
            self.optimizer.removesuffix("-paged") in ON_SHARDS,
            f"`optimizer` {self.optimizer} and `parallel` fsdp: it is not tested on shards of weights.\n"
            f"Use {' or '.join(ON_SHARDS)}, or `parallel` ddp.",
        )
        placement = self._placement_of_any_kind()
        kept = {"weights", "optimizer"} | ({"inputs"} if self.memory in ("small", "least") else set())
        self._require(
            placement is None or all(getattr(placement, name) == "device" for name in kept),
            f"`memory` {self.memory}{f', `place` {self.place}' if self.place else ''} and `parallel` fsdp: a "
            "step that runs layer by layer needs whole layers, and each process has shards of them.\n"
            "Leave `memory` and `place` out, or use `parallel` ddp.",
        )

    @property
    def is_adapted(self) -> bool:
        """Return whether the options add an adapter; a model may also have one already."""
        return self.lora_r is not None or self.peft_config is not None

    def peak_lr(self, *, is_adapted: bool) -> float:
        """The peak learning rate: the given one, or a default that is larger for an adapter."""
        return self.lr or (ADAPTER_LR if is_adapted else WHOLE_LR)

    def placement(self, *, is_adapted: bool | None = None) -> Placement | None:
        """Where the run keeps its tensors; None: what fits is to be found. Raises `OptionError`."""
        is_adapted = self.is_adapted if is_adapted is None else is_adapted
        return placement_of(self.memory, ",".join(self._places()) or None, is_adapted=is_adapted)

    def _placement_of_any_kind(self) -> Placement | None:
        """The placement; a model may have an adapter that the options do not name."""
        try:
            return self.placement()
        except OptionError:
            if self.is_adapted or self.model is None:
                raise
            return self.placement(is_adapted=True)

    def placement_entry(self, name: str) -> str | None:
        """The value that `place` gives an entry."""
        entries = (entry.partition("=") for entry in ",".join(self._places()).split(","))
        return next((value.strip() for key, _, value in entries if key.strip() == name), None)

    def earlier_names(self) -> dict[str, str]:
        """The options given under earlier names, with what they mean now."""
        used = {
            "`free_gradients`": ("gradients=none", self.free_gradients),
            "`offload_activations`": ("inputs=host", self.offload_activations),
            f"`optimizer` {self.optimizer}": (
                "optimizer=host,gradients=host",
                self.optimizer.endswith("-paged") and not self.is_adapted,
            ),
        }
        return {name: entry for name, (entry, is_used) in used.items() if is_used}

    def _places(self) -> list[str]:
        """The entries of `place`, and those that earlier names of options map to."""
        entries = [] if self.place is None else [self.place]
        entries += ["gradients=none"] if self.free_gradients else []
        if self.optimizer.endswith("-paged") and not self.is_adapted:
            entries += ["optimizer=host", *([] if self.free_gradients else ["gradients=host"])]
        return entries + (["inputs=host"] if self.offload_activations else [])

    def _check_adapter(self) -> None:
        for name in ("lora_alpha", "lora_targets"):
            value = getattr(self, name)
            self._require(
                value in (None, "all-linear") or self.lora_r is not None,
                f"`{name}` {value} is used only with `lora_r`.",
            )
        self._require(
            all(self.lora_targets.split(",")),
            f"`lora_targets` {self.lora_targets}: expected all-linear, or names with commas.",
        )
        self._require(
            self.lora_r is None or self.peft_config is None, "`lora_r` and `peft_config`: give one of them."
        )
        self._require(
            not self.merge_adapter or self.quantize == "none",
            f"`merge_adapter` and `quantize` {self.quantize}: quantized weights cannot take an adapter "
            "without loss.\n"
            "Leave `merge_adapter` out, and merge the adapter into the whole model afterwards (peft: "
            "`merge_and_unload`).",
        )

    def _check_run(self) -> None:
        period("`eval_every`", self.eval_every)
        period("`save_every`", self.save_every)
        has_eval = self.eval_pairs is not None or self.eval_fraction is not None
        for name in ("eval_every", "patience", "sample"):
            value = getattr(self, name)
            self._require(
                not value or has_eval,
                f"`{name}` {value}: there is nothing to evaluate on.\nGive `eval_pairs` or `eval_fraction`.",
            )
        self._require(
            self.best == "loss" or has_eval,
            f"`best` {self.best}: there is nothing to evaluate on.\nGive `eval_pairs` or `eval_fraction`.",
        )
        self._require(
            self.keep == 1 or self.save_every is not None,
            f"`keep` {self.keep}: set how often to save with `save_every`.",
        )
        self._require(
            self.patience is None or self.eval_every is not None,
            f"`patience` {self.patience}: set how often to evaluate with `eval_every`.",
        )
        self._require(
            self.rounding == "auto" or self.precision == "bf16",
            f"`rounding` {self.rounding} is used only with `precision` bf16, which updates in bf16.",
        )
        placement = self._placement_of_any_kind()
        self._require(
            self.max_grad_norm == 0 or not (self._places() and placement and placement.gradients == "none"),
            f"`place` gradients=none and `max_grad_norm` {self.max_grad_norm}: the norm needs all gradients "
            "at once.\nGive `max_grad_norm` 0.",
        )
        for name in self.log_to:
            self._require(name in TRACKERS, f"`log_to` {name}: expected one of {', '.join(TRACKERS)}.")
        self._require(
            len(set(self.log_to)) == len(self.log_to), f"`log_to` {' '.join(self.log_to)}: each tracker once."
        )
        self._require(
            self.log_names == "trl" or bool(self.log_to),
            f"`log_names` {self.log_names} is used only with `log_to`.",
        )
        self._require(
            not (self.dry_run and self.resume),
            "`dry_run` and `resume`: a dry run starts at the beginning.\nGive one of them.",
        )


def period(flag: str, value: str | None) -> tuple[int | None, float | None]:
    """`"100"` as `(100, None)` steps, `"0.5epochs"` as `(None, 0.5)`; None as neither. Raises
    `OptionError`.
    """
    if value is None:
        return None, None
    number = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)?\s*(epochs?)?", value)
    is_epochs = bool(number and number[2])
    amount = float(number[1] or (1 if is_epochs else 0)) if number else 0.0
    if amount <= 0 or not (is_epochs or amount.is_integer()):
        raise OptionError(
            f"{flag} {value}: expected a number of steps above 0, or of epochs as in 0.5epochs."
        )
    return (None, amount) if is_epochs else (int(amount), None)
