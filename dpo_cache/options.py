"""Every option of every command: name, type, default, unit, help and check, in one place.

The command line is made from these classes, the Python functions take the same names as keyword
arguments, and a run writes them as JSON beside its output.
"""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import PurePath
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.loss_names import LOSSES, check_serves, loss_terms

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "forest", "rows")
TRUNCATIONS = ("keep-start", "keep-end", "prompt-left", "drop")
FORMATS = ("auto", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "ranked")
EXPORT_FORMATS = ("auto", "parquet", "jsonl", "datasets")
IMPORT_FORMATS = ("auto", "ids", *(name for name in FORMATS if name not in ("auto", "ranked")))
IMPORT_DTYPES = ("unknown", "float32", "bfloat16", "float16")
RANKED_PAIRS = ("all", "best")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
WPO = ("off", "on", "clipped")
LR_SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw",)
RECOMPUTATIONS = ("auto", "none", "selective", "full")
PRECISIONS = ("auto", "fp32", "bf16-mixed", "bf16")


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), flag: str = "", required: bool = False) -> Any:
    """A dataclass field with its help text, accepted values and, where it differs from the name, its flag."""
    metadata = {"help": help, "choices": choices, "flag": flag, "required": required, "positional": ""}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(default: Any, help: str, *, name: str, choices: tuple[str, ...] = (), required: bool = False) -> Any:
    """A dataclass field that is given by its place on the command line, under this name in the help; a tuple takes all that is left."""
    metadata = {"help": help, "choices": choices, "flag": name, "required": required, "positional": name}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of the option classes: checks choices, then what `check` adds."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, entry.name, value)
            if entry.default_factory is not MISSING:  # may be given several times
                object.__setattr__(self, entry.name, (value,) if isinstance(value, str) else tuple(value))
            if entry.type in ("int", "int | None") and value is not None and type(value) is not int:
                raise OptionError(f"{flag_of(entry)} {value!r}: expected a whole number.")
            if choices and value not in choices and (value is not None or entry.metadata["required"]):
                raise OptionError(f"{flag_of(entry)} {value}: expected one of {', '.join(choices)}.")
            if entry.metadata["required"] and value in (None, "", ()):
                raise OptionError(f"{flag_of(entry)} is needed.")
        self.check()

    def check(self) -> None:
        """Raise `OptionError` for values that make no sense, alone or together."""

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise OptionError(message)


def flag_of(entry: Any) -> str:
    """The option's flag on the command line, or the name of a positional argument."""
    return entry.metadata["flag"].split("/")[0] or "--" + entry.name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class PrecomputeOptions(Options):
    """Options of `dpo-cache precompute`; see `dpo_cache.precompute`."""

    model: str = option(None, "Reference model: a local folder or a Hub id.", required=True)
    dataset: str = option(None, "Preference data: a .jsonl, .json, .csv or .parquet file, a folder, or a Hub id.", required=True)
    cache: str = option(None, "Cache to read and write: a folder, or an fsspec URL such as s3://bucket/cache.", required=True)
    name: str | None = option(None, "Name of the pair set. Default: the data's name.")
    split: tuple[str, ...] = option((), "Split of the data; may be repeated. Default: train, or the only one.")
    limit: int | None = option(None, "Read the first N rows of each split alone.")
    streaming: bool = option(False, "Read the data as a stream, a window at a time, instead of whole.", flag="--streaming")
    window: int = option(16384, "Pairs that are sorted, scored and joined at once: bounds the memory of everything but the model.")
    format: str = option("auto", "Format of the data. auto: recognised from the columns.", choices=FORMATS)
    map: tuple[str, ...] = option((), "Give a column the name a format expects, as in prompt=question; may be repeated.")
    ranked_pairs: str = option("all", "Pairs made of ranked answers: all, or the best against each.", choices=RANKED_PAIRS)
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    expect_reference: str | None = option(None, "Id (or its first characters) of a reference in the cache that the model must be.")
    tokenizer: str | None = option(None, "Tokenizer, where it is not the model's own: a folder or a Hub id.")
    chat_template: str | None = option(None, "File with a Jinja chat template, instead of the tokenizer's.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", flag="--trust-remote-code")
    dtype: str = option("auto", "Dtype of the forward pass. auto: the checkpoint's on a GPU, float32 on a CPU.", choices=DTYPES)
    device: str = option("auto", "Where to compute. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    max_length: int = option(1024, "Longest prompt + answer, in tokens.")
    truncation: str = option("keep-start", "What happens to longer rows.", choices=TRUNCATIONS)
    max_prompt_length: int | None = option(None, "Tokens a prompt keeps under prompt-left. Default: half of --max-length.")
    budget_tokens: str = option("auto", "Tokens run through the model at once: auto or a number.")
    dry_run: bool = option(False, "Survey the data and say what would be scored; load no model, write nothing.", flag="--dry-run")
    attention: str = option("auto", "forest shares prefixes, rows pads; auto takes the forest where it proves exact.", choices=ATTENTIONS)

    def check(self) -> None:
        self._require(self.limit is None or self.limit > 0, f"--limit {self.limit}: expected a positive number of rows.")
        self._require(self.max_length >= 2, f"--max-length {self.max_length}: a prompt token and an answer token need at least 2.")
        if self.max_prompt_length is not None:
            self._require(self.truncation == "prompt-left", "--max-prompt-length is used by --truncation prompt-left alone.")
            self._require(
                0 < self.max_prompt_length < self.max_length,
                f"--max-prompt-length {self.max_prompt_length}: expected 1 to {self.max_length - 1}, below --max-length.",
            )
        self._require(self.window > 0, f"--window {self.window}: expected a positive number of pairs.")
        renamed_columns(self.map)
        number_or_auto("--budget-tokens", self.budget_tokens)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of `dpo-cache train`; see `dpo_cache.train`."""

    cache: str = option(None, "Cache with the pair set: a folder or an fsspec URL.", required=True)
    output: str = option(None, "Folder of the run: config.json, metrics.jsonl, checkpoints/, model/.", required=True)
    model: str | None = option(None, "Policy to start from: a folder or a Hub id. Default: the reference's own checkpoint.")
    pairs: str | None = option(None, "Pair set to train on, NAME or NAME/SPLIT. Default: the only one in the cache.")
    eval_pairs: str | None = option(None, "Pair set to evaluate on, NAME or NAME/SPLIT.")
    eval_fraction: float | None = option(None, "Share of the prompts to hold out for evaluation instead, above 0 and below 1.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", flag="--trust-remote-code")
    reference: str | None = option(None, "Id (or its first characters) of the reference that the pairs must have been scored by.")
    loss: tuple[str, ...] = option(("sigmoid",), f"{', '.join(LOSSES)}; repeated as NAME:WEIGHT it is a weighted sum. Default: sigmoid (DPO).")
    beta: float = option(0.1, "Strength of the pull to the reference; tau for IPO, the scale of the margin for SimPO, lambda for ORPO.")
    label_smoothing: float = option(0.0, "Assumed share of flipped labels, 0 to 0.5: cDPO, or as the loss defines it.")
    f_divergence: str = option("reverse_kl", "What holds the policy to the reference; reverse_kl is DPO.", choices=F_DIVERGENCES)
    f_alpha: float = option(0.5, "alpha of --f-divergence alpha_divergence.")
    ld_alpha: float | None = option(None, "LD-DPO: weight, 0 to 1, of the tokens past the length of a pair's shorter answer.")
    ld_reference: bool = option(True, "Weight the reference's tokens under --ld-alpha, too.", flag="--ld-reference/--no-ld-reference")
    wpo: str = option("off", "WPO: weight pairs by how likely the policy is to write them; clipped: by 1 at most.", choices=WPO)
    discopop_tau: float = option(0.05, "tau of DiscoPOP.")
    simpo_gamma: float = option(0.5, "Target margin of SimPO, after beta.")
    cpo_alpha: float = option(1.0, "Weight of the likelihood of the chosen answer in CPO.")
    router_aux_loss_coef: float | None = option(None, "Weight of a mixture of experts' router loss; 0: none. Default: the model config's.")
    reference_free: bool = option(False, "Take a uniform reference in the loss.", flag="--reference-free")
    epochs: float = option(1.0, "Passes over the pairs.")
    max_steps: int | None = option(None, "Stop after N steps, whatever --epochs says.")
    batch_size: int = option(32, "Pairs a step.")
    micro_tokens: str = option("auto", "Tokens run at once within a step: auto or a number. Changes memory and speed, not the result.")
    shuffle: bool = option(True, "Shuffle the pairs each epoch.", flag="--shuffle/--no-shuffle")
    seed: int = option(0, "Seed of the training order.")
    lr: float = option(1e-6, "Peak learning rate.")
    lr_schedule: str = option("linear", "Decay of the learning rate after the warm-up.", choices=LR_SCHEDULES)
    warmup_ratio: float = option(0.1, "Share of the steps over which the learning rate rises from 0.")
    optimizer: str = option("adamw", "Optimizer.", choices=OPTIMIZERS)
    weight_decay: float = option(0.0, "Weight decay.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm; 0: never.")
    precision: str = option("auto", "auto: bf16-mixed on CUDA GPUs that have it, else fp32.", choices=PRECISIONS)
    gradient_checkpointing: str = option(
        "auto", "Activations computed again in the backward pass: none, all but matrix products (selective), or full.", choices=RECOMPUTATIONS
    )
    device: str = option("auto", "Where to compute. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    eval_every: int | None = option(None, "Evaluate every N steps, besides before and after training.")
    save_every: int | None = option(None, "Save a checkpoint to resume from every N steps.")
    resume: bool = option(False, "Go on from the last saved step in the output folder.", flag="--resume")

    def check(self) -> None:
        for name in ("beta", "epochs", "lr", "weight_decay", "max_grad_norm", "f_alpha", "discopop_tau", "simpo_gamma"):
            value = getattr(self, name)
            self._require(math.isfinite(value), f"--{name.replace('_', '-')} {value}: expected a finite number.")
        self._require(self.seed >= 0, f"--seed {self.seed}: expected 0 or more.")
        self._require(self.beta > 0, f"--beta {self.beta}: expected a number above 0.")
        self._check_losses()
        self._require(self.eval_pairs is None or self.eval_fraction is None, "--eval-pairs and --eval-fraction: give one of them.")
        self._require(
            self.eval_fraction is None or 0 < self.eval_fraction < 1, f"--eval-fraction {self.eval_fraction}: expected above 0 and below 1."
        )
        self._require(self.epochs > 0, f"--epochs {self.epochs}: expected a number above 0.")
        for name in ("max_steps", "batch_size", "eval_every", "save_every"):
            value = getattr(self, name)
            self._require(value is None or value > 0, f"--{name.replace('_', '-')} {value}: expected a number above 0.")
        self._require(self.lr > 0, f"--lr {self.lr}: expected a number above 0.")
        self._require(0 <= self.warmup_ratio <= 1, f"--warmup-ratio {self.warmup_ratio}: expected 0 to 1.")
        self._require(self.weight_decay >= 0, f"--weight-decay {self.weight_decay}: expected 0 or more.")
        self._require(self.max_grad_norm >= 0, f"--max-grad-norm {self.max_grad_norm}: expected 0 (never clip) or more.")
        number_or_auto("--micro-tokens", self.micro_tokens)

    def _check_losses(self) -> None:
        names, smoothing = tuple(loss_terms(self.loss)), self.label_smoothing
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value != entry.default:
                check_serves(entry.name, flag_of(entry) if value is True else f"{flag_of(entry)} {value}", names)
        self._require(0 <= smoothing <= 0.5, f"--label-smoothing {smoothing}: expected 0 to 0.5.")
        self._require("robust" not in names or smoothing < 0.5, f"--label-smoothing {smoothing}: --loss robust expects less than 0.5.")
        self._require("exo_pair" not in names or smoothing > 0, "--loss exo_pair needs a --label-smoothing above 0; its paper takes 0.001.")
        self._require(self.discopop_tau > 0, f"--discopop-tau {self.discopop_tau}: expected a number above 0.")
        self._require(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, f"--ld-alpha {self.ld_alpha}: expected 0 to 1.")
        self._require(self.ld_reference or self.ld_alpha is not None, "--no-ld-reference is used with --ld-alpha alone.")
        self._require(self.f_alpha == 0.5 or self.f_divergence == "alpha_divergence", "--f-alpha is used by --f-divergence alpha_divergence alone.")
        self._require(
            not (self.reference_free and self.f_divergence != "reverse_kl"), "--reference-free and --f-divergence: there is nothing to diverge from."
        )
        for name in ("cpo_alpha", "router_aux_loss_coef"):
            value = getattr(self, name)
            self._require(value is None or 0 <= value < math.inf, f"--{name.replace('_', '-')} {value}: expected 0 or more.")


@dataclass(frozen=True, kw_only=True)
class LsOptions(Options):
    """Options of `dpo-cache ls`."""

    cache: str = argument(None, "Cache: a folder or an fsspec URL.", name="CACHE", required=True)
    name: str | None = argument(None, "Show one in full: a pair set NAME/SPLIT, or the first characters of a reference's id.", name="NAME")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Options of `dpo-cache verify`."""

    cache: str = argument(None, "Cache: a folder or an fsspec URL.", name="CACHE", required=True)
    repair: bool = option(False, "Move bad files to CACHE/.quarantine, and say what to run to score again what was lost.", flag="--repair")
    rescore: int | None = option(None, "Score N random completions of the pair sets again, with --model, and compare.")
    model: str | None = option(None, "Model for --rescore: a local folder or a Hub id. It must be the reference.")
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    device: str = option("auto", "Where --rescore computes. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", flag="--trust-remote-code")

    def check(self) -> None:
        self._require((self.rescore is None) == (self.model is None), "--rescore N and --model MODEL go together.")
        self._require(self.rescore is None or self.rescore > 0, f"--rescore {self.rescore}: expected a positive number of completions.")
        for flag, is_given in (
            ("--revision", self.revision is not None),
            ("--device", self.device != "auto"),
            ("--trust-remote-code", self.trust_remote_code),
        ):
            self._require(self.rescore is not None or not is_given, f"{flag} is used by --rescore alone.")


@dataclass(frozen=True, kw_only=True)
class CompactOptions(Options):
    """Options of `dpo-cache compact`."""

    cache: str = argument(None, "Cache: a folder or an fsspec URL.", name="CACHE", required=True)
    reference: str | None = option(None, "Id (or its first characters) of the only reference to compact. Default: all.")


@dataclass(frozen=True, kw_only=True)
class GcOptions(Options):
    """Options of `dpo-cache gc`."""

    cache: str = argument(None, "Cache: a folder or an fsspec URL.", name="CACHE", required=True)
    keep: tuple[str, ...] = option((), "Reference to keep though no pair set was scored by it: its id, or a pair set; may be repeated.")
    scores: bool = option(False, "Drop the scores of completions, too, that no pair set holds.", flag="--scores")
    grace: float = option(3600.0, "Leave what was written in the last so many seconds: a run may be about to need it.")
    yes: bool = option(False, "Do it. Without, only what would go is shown.", flag="--yes")

    def check(self) -> None:
        self._require(self.grace >= 0, f"--grace {self.grace}: expected 0 or more seconds.")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Options of `dpo-cache merge`."""

    sources: tuple[str, ...] = argument((), "Caches to take from: folders or fsspec URLs.", name="SRC...", required=True)
    destination: str = argument(None, "Cache that gets what it lacks; made where there is none.", name="DEST", required=True)
    prefer: str | None = option(None, "Of pair sets of one name with other pairs, keep DEST's or take the last SRC's.", choices=("src", "dest"))
    rename: bool = option(False, "Keep all of them, each under its name and the first characters of its digest.", flag="--rename")

    def check(self) -> None:
        self._require(not (self.prefer and self.rename), "--prefer and --rename: give one of them.")


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Options):
    """Options of `dpo-cache diff`."""

    a: str = argument(None, "Cache: a folder or an fsspec URL.", name="A", required=True)
    b: str = argument(None, "The other cache.", name="B", required=True)


@dataclass(frozen=True, kw_only=True)
class RmOptions(Options):
    """Options of `dpo-cache rm`."""

    cache: str = argument(None, "Cache: a folder or an fsspec URL.", name="CACHE", required=True)
    kind: str = argument(None, "What to remove.", name="KIND", choices=("reference", "pairs"), required=True)
    name: str = argument(None, "First characters of the reference's id; or NAME (all its splits) or NAME/SPLIT.", name="NAME", required=True)
    with_pairs: bool = option(False, "Remove the reference's pair sets with it.", flag="--with-pairs")
    yes: bool = option(False, "Do it. Without, only what would go is shown.", flag="--yes")

    def check(self) -> None:
        self._require(self.kind == "reference" or not self.with_pairs, "--with-pairs goes with `reference`: `pairs` are removed anyway.")


@dataclass(frozen=True, kw_only=True)
class CopyOptions(Options):
    """What `pull` and `push` copy; their ends are checked alike."""

    pairs: tuple[str, ...] = option((), "Copy this pair set, NAME or NAME/SPLIT, and its reference's entry; may be repeated. Default: everything.")
    reference: tuple[str, ...] = option((), "Copy the reference of this id (or its first characters) with its scores; may be repeated.")
    replace: bool = option(False, "Replace pair sets of the same name that hold other pairs or values at the target.", flag="--replace")

    def check(self) -> None:
        remote, local = (getattr(self, name).removeprefix("file://") for name in ("remote", "local"))
        order = "Mind the order: `dpo-cache pull REMOTE LOCAL`, `dpo-cache push LOCAL REMOTE`."
        self._require("://" not in local, f"LOCAL {local}: expected a folder.\n{order}")
        self._require("://" in remote, f"REMOTE {remote}: expected a URL such as s3://bucket/cache.\nBetween two folders use `dpo-cache merge`.")


@dataclass(frozen=True, kw_only=True)
class PullOptions(CopyOptions):
    """Options of `dpo-cache pull`."""

    remote: str = argument(None, "Cache to copy from: an fsspec URL such as s3://bucket/cache.", name="REMOTE", required=True)
    local: str = argument(None, "Folder to copy into; it is made where it is missing.", name="LOCAL", required=True)


@dataclass(frozen=True, kw_only=True)
class PushOptions(CopyOptions):
    """Options of `dpo-cache push`."""

    local: str = argument(None, "Folder of the cache to copy from.", name="LOCAL", required=True)
    remote: str = argument(None, "Cache to copy into: an fsspec URL such as s3://bucket/cache.", name="REMOTE", required=True)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options of `dpo-cache export`; see `dpo_cache.exchange.export_pairs`."""

    cache: str = argument(None, "Cache with the pair set: a folder or an fsspec URL.", name="CACHE", required=True)
    pairs: str = argument(None, "Pair set to export, NAME or NAME/SPLIT.", name="NAME/SPLIT", required=True)
    out: str = argument(None, "File to write, or folder for --format datasets.", name="OUT", required=True)
    format: str = option(
        "auto",
        "auto: parquet or jsonl by the ending of OUT, datasets (a folder for `load_from_disk`) where it has none.",
        choices=EXPORT_FORMATS,
    )
    token_logps: bool = option(False, "Add the log-prob of each token.", flag="--token-logps")
    text: bool = option(True, "Add prompt, chosen and rejected, where the source is at hand and makes the same pairs.", flag="--text/--no-text")
    dataset: str | None = option(None, "Where the source data lies now. Default: where it lay when the pair set was made.")
    tokenizer: str | None = option(None, "Where the tokenizer lies now. Default: where it lay when the pair set was made.")
    overwrite: bool = option(False, "Replace OUT if it is there.", flag="--overwrite")

    def check(self) -> None:
        self._require(self.text or not self.dataset, "--dataset is used for the text alone: leave out --no-text.")
        self._require(self.text or not self.tokenizer, "--tokenizer is used for the text alone: leave out --no-text.")
        self._require(
            self.format != "auto" or PurePath(self.out).suffix.lower() in (".parquet", ".jsonl", ""),
            f"{self.out}: no format has this ending.\nEnd it in .parquet or .jsonl, in nothing for a folder, or name one with --format.",
        )


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """Options of `dpo-cache import`; see `dpo_cache.exchange.import_pairs`."""

    cache: str = argument(None, "Cache to write to: a folder or an fsspec URL.", name="CACHE", required=True)
    dataset: str = argument(None, "Pairs with ref_chosen_logps and ref_rejected_logps: a file, a folder, or a Hub id.", name="DATASET", required=True)
    reference: str = option(None, "What to call the model that the log-probs are from.", required=True)
    name: str | None = option(None, "Name of the pair set. Default: the data's name.")
    split: tuple[str, ...] = option((), "Split of the data; may be repeated. Default: train, or the only one.")
    format: str = option("auto", "Format of the data. auto: ids where prompt_ids, chosen_ids and rejected_ids are there.", choices=IMPORT_FORMATS)
    map: tuple[str, ...] = option((), "Give a column its name here, as in ref_chosen_logps=reference_chosen_logps; may be repeated.")
    model: str | None = option(None, "Checkpoint of that model, if at hand: a folder or a Hub id. Training starts from it by default.")
    tokenizer: str | None = option(None, "Tokenizer that makes (or made) the token ids: a folder or a Hub id. Default: the model's.")
    chat_template: str | None = option(None, "File with a Jinja chat template, instead of the tokenizer's.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the tokenizer.", flag="--trust-remote-code")
    dtype: str = option("unknown", "Dtype of the forward pass that made the log-probs.", choices=IMPORT_DTYPES)
    max_length: int | None = option(None, "Longest prompt + answer when they were made. Default: 1024 for text; token ids are not cut.")
    truncation: str = option("keep-start", "What happened to longer rows.", choices=TRUNCATIONS)
    max_prompt_length: int | None = option(None, "Tokens a prompt kept under prompt-left. Default: half of --max-length.")

    def check(self) -> None:
        self._require(self.max_length is None or self.max_length >= 2, f"--max-length {self.max_length}: expected at least 2.")
        if self.max_prompt_length is not None:
            self._require(self.truncation == "prompt-left", "--max-prompt-length is used by --truncation prompt-left alone.")
            longest = self.max_length or 1024
            self._require(
                0 < self.max_prompt_length < longest,
                f"--max-prompt-length {self.max_prompt_length}: expected 1 to {longest - 1}, below --max-length.",
            )
        renamed_columns(self.map)


def number_or_auto(flag: str, value: str) -> int | None:
    """The number, or None for `auto`. Raises `OptionError`."""
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise OptionError(f"{flag} {value}: expected auto or a positive number.")
    return int(value)


def renamed_columns(entries: tuple[str, ...]) -> dict[str, str]:
    """`("prompt=question",)` as `{"prompt": "question"}`: the name expected -> the column's own. Raises `OptionError`."""
    parts = [entry.partition("=") for entry in entries]
    for entry, (expected, _, column) in zip(entries, parts, strict=True):
        if not expected or not column:
            raise OptionError(f"--map {entry}: expected NAME=COLUMN, for example prompt=question.")
    renamed: dict[str, str] = {}
    for expected, _, column in parts:
        if expected in renamed:
            raise OptionError(f"--map {expected}={column}: {expected} is {renamed[expected]} already.\nGive each name one column.")
        renamed[expected] = column
    return renamed


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json as this version writes it: options that came later have their defaults, `loss` is a list."""
    defaults = {entry.name: None if entry.default is MISSING else entry.default for entry in fields(TrainOptions)}
    loss = config.get("loss", ["sigmoid"])
    return {**defaults, **config, "loss": [loss] if isinstance(loss, str) else loss}
