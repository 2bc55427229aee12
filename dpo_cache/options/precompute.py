"""Every option of `precompute`: name, type, default, unit, help and check."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import ClassVar

from dpo_cache.errors import OptionError
from dpo_cache.options.base import (
    ABOVE_0,
    AT_LEAST_0,
    ATTENTIONS,
    DEVICES,
    DTYPES,
    QUANTIZATIONS,
    Options,
    cache_argument,
    number_or_auto,
    option,
)

TRUNCATIONS = ("keep-start", "keep-end", "prompt-left", "drop")
RANKED_FORMATS = ("ranked", "completions")  # a row may make several pairs
FORMATS = (
    "auto", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "messages", "swift",
    "openai", "output", "compared", *RANKED_FORMATS,
)  # fmt: skip
RANKED_PAIRS = ("all", "best")
ON_ERROR = ("stop", "drop")
EARLY_ANSWERS = ("stop", "keep")
STREAM_WEIGHTS = ("auto", "on", "off")
DEVICE_MAPS = ("off", "auto")
AUDIT_INTERVAL = 500  # under auto


@dataclass(frozen=True, kw_only=True)
class PrecomputeOptions(Options):
    """Options of `dpo-cache precompute`; see `dpo_cache.precompute`."""

    groups: ClassVar[dict[str, str]] = {"num_workers": "Several devices"}

    model: str = option(None, "Reference model: a local folder or a Hub id.", required=True)
    dataset: str = option(
        None,
        "Preference data: a file (.jsonl, .json, .csv, .tsv, also compressed; .parquet, .arrow), a pattern "
        "in quotes for several files, a folder, or a Hub id.",
        required=True,
    )
    cache: str = cache_argument(
        "Cache to read and write: a folder, or an fsspec URL such as s3://bucket/cache."
    )
    name: str | None = option(None, "Name of the pair set. Default: the data's name.")
    split: tuple[str, ...] = option(
        (), "Split of the data; may be repeated. Default: train, or the only one."
    )
    limit: int | None = option(
        None,
        "Read only the first N rows of each split.",
        limit=(lambda value: value > 0, "a positive number of rows"),
    )
    streaming: bool = option(
        False, "Read the data as a stream, a window at a time, instead of whole.", flag="--streaming"
    )
    window: int = option(
        16384,
        "Pairs that are sorted, scored and joined at once: bounds the memory of everything but the model.",
        limit=(lambda value: value > 0, "a positive number of pairs"),
    )
    format: str = option("auto", "Format of the data. auto: recognised from the columns.", choices=FORMATS)
    map: tuple[str, ...] = option(
        (), "Give a column the name a format expects, as in prompt=question; may be repeated."
    )
    ranked_pairs: str = option(
        "all", "Pairs made of ranked answers: all, or the best against each.", choices=RANKED_PAIRS
    )
    on_error: str = option(
        "stop",
        "Rows that cannot be used: stop, and name them all; or drop them, and name them in a remark.",
        choices=ON_ERROR,
    )
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    reference: str | None = option(
        None,
        "Id (or its first characters) of the reference in the cache that the model must be.",
        old=("expect_reference",),
    )
    tokenizer: str | None = option(None, "Tokenizer, if it is not the model's own: a folder or a Hub id.")
    chat_template: str | None = option(
        None,
        "File with a Jinja chat template, instead of the tokenizer's; or the name of one of the tokenizer's "
        "own.",
    )
    template_date: str | None = option(
        None,
        "Day that the chat template writes, as in 2026-11-28, if it writes one. Default: that of the pair "
        "set's first run, or today.",
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model.", flag="--trust-remote-code"
    )
    dtype: str = option(
        "auto",
        "Dtype of the forward pass. auto: the checkpoint's on a GPU, float32 on a CPU.",
        choices=DTYPES,
    )
    quantize: str = option(
        "none",
        "Score the model with its weights in 8 or 4 bits (bitsandbytes), as `train --quantize` holds them.",
        choices=QUANTIZATIONS,
    )
    device: str = option("auto", "Where to compute. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    max_length: int = option(
        1024,
        "Longest prompt + answer, in tokens.",
        limit=(lambda value: value >= 2, "at least 2: a token of the prompt and one of the answer"),
    )
    truncation: str = option("keep-start", "How to cut longer rows, or drop them.", choices=TRUNCATIONS)
    max_prompt_length: int | None = option(
        None, "Tokens a prompt keeps under prompt-left. Default: half of --max-length."
    )
    budget_tokens: str = option("auto", "Tokens run through the model at once: auto or a number.")
    overwrite: bool = option(
        False,
        "Replace a pair set of that name that was made from another source or by another reference.",
        flag="--overwrite",
        old=("replace",),
    )
    dry_run: bool = option(
        False,
        "Survey the data; report what would be scored, time, memory and disk; load no model, write nothing.",
        flag="--dry-run",
    )
    show: int = option(
        0,
        "Print N rows of each split before they are scored: decoded, with the end of the prompt, and with "
        "the parts that are cut off. Dropped rows are shown, too.",
        limit=(lambda value: value >= 0, "0 or more rows"),
    )
    early_answers: str = option(
        "stop",
        "Stop if tokens of the prompt merge with the answer in most rows (a sign of a wrong format), or keep "
        "these rows.",
        choices=EARLY_ANSWERS,
    )
    attention: str = option(
        "auto",
        "forest shares prefixes, rows pads. auto: forest if a check shows that it is exact.",
        choices=ATTENTIONS,
    )
    stream_weights: str = option(
        "auto",
        "Read the weights layer by layer, each layer for many chunks, instead of keeping them on the device. "
        "auto: where they are larger than its free memory.",
        choices=STREAM_WEIGHTS,
    )
    audit: str = option(
        "auto",
        "Completions that are scored a second time, by the model's own forward on one row, before scores are "
        "kept: auto (the longest, 1 in 500 but at least 8, and a few with rare tokens), N (1 in N), or off.",
    )
    num_workers: int | None = option(
        None,
        "Processes that score at once, each on a device of its own: on this machine, or in the cluster of "
        "--ray. Default: this process, or as many as the cluster has room for.",
        limit=(lambda value: value > 0, "a positive number of workers"),
    )
    min_workers: int | None = option(
        None,
        "With --ray: workers to start with; more are started while units wait, up to --max-workers.",
        limit=(lambda value: value > 0, "a positive number of workers"),
    )
    max_workers: int | None = option(
        None,
        "With --ray: the largest number of workers.",
        limit=(lambda value: value > 0, "a positive number of workers"),
    )
    ray: str | None = option(
        None,
        "Score on Ray, which the package's extra `ray` installs: local (a cluster of this machine, for this "
        "run), auto (the one that runs here) or the address of its head.",
        metavar="local|auto|ADDRESS",
    )
    gpus_per_worker: float | None = option(
        None,
        "With --ray: GPUs of each worker. Default: 1 in a cluster that has any.",
        limit=AT_LEAST_0,
    )
    cpus_per_worker: float | None = option(
        None,
        "With --ray: cores of each worker. Default: 1, or without GPUs a worker's share of the node.",
        limit=ABOVE_0,
    )
    unit_tokens: str = option(
        "auto",
        "Tokens of a unit of work: auto (about 20 s of scoring, at least 8,192; 16 units or more for each of "
        "several workers) or a number.",
    )
    device_map: str = option(
        "off",
        "auto: spread the reference's layers over the devices that a process sees, then the CPU, then disk.",
        choices=DEVICE_MAPS,
    )

    def check(self) -> None:
        audit_interval(self.audit)
        check_prompt_length(self.max_prompt_length, self.truncation, self.max_length)
        renamed_columns(self.map)
        check_template_date(self.template_date)
        number_or_auto("budget_tokens", self.budget_tokens)
        number_or_auto("unit_tokens", self.unit_tokens)
        self._check_workers()

    @property
    def uses_workers(self) -> bool:
        """Return whether other processes score."""
        return self.ray is not None or (self.num_workers or 1) > 1

    def _check_workers(self) -> None:
        only_ray = ("min_workers", "max_workers", "gpus_per_worker", "cpus_per_worker")
        given = [name for name in only_ray if getattr(self, name) is not None]
        self._require(
            self.ray is not None or not given,
            f"`{given[0] if given else ''}` is used only with `ray`.\n"
            "Give `ray`, or leave it out; `num_workers` starts processes on this machine.",
        )
        bounds = [name for name in only_ray[:2] if getattr(self, name) is not None]
        self._require(
            self.num_workers is None or not bounds,
            f"`num_workers` and `{bounds[0] if bounds else ''}`: give a fixed number of workers, or bounds.",
        )
        least, most = self.min_workers or 1, self.max_workers
        self._require(
            most is None or least <= most,
            f"`min_workers` {least}: expected at most `max_workers`, {most}.",
        )
        self._require(
            not self.gpus_per_worker or self.device in ("auto", "cuda"),
            f"`device` {self.device} and `gpus_per_worker` {self.gpus_per_worker or 0:g}: workers with a GPU "
            "compute on it.\nLeave one of them out.",
        )
        self._require(
            self.gpus_per_worker != 0 or self.device in ("auto", "cpu"),
            f"`device` {self.device} and `gpus_per_worker` 0: workers without a GPU compute on the CPU.\n"
            "Leave one of them out.",
        )
        self._require(
            self.ray is None or not self.streaming,
            "`streaming` with `ray`: the units of a run must be known before its workers start.\n"
            "Leave `streaming` out, or use `num_workers` on one machine.",
        )
        self._require(
            self.device_map == "off" or self.stream_weights != "on",
            "`device_map` auto and `stream_weights` on: two ways to run a reference that is larger than a "
            "device.\nGive one of them.",
        )


def audit_interval(value: str) -> int | None:
    """One in how many completions is audited at random; None for `off`. Raises `OptionError`."""
    if value == "off":
        return None
    if value == "auto":
        return AUDIT_INTERVAL
    if not value.isdecimal() or int(value) < 1:
        raise OptionError(
            f"`audit` {value}: expected auto, off or a number N, to audit one completion in N (1: all)."
        )
    return int(value)


def check_prompt_length(max_prompt_length: int | None, truncation: str, max_length: int) -> None:
    """Raise `OptionError` for a `max_prompt_length` that has no use or leaves no room for the answer."""
    if max_prompt_length is None:
        return
    if truncation != "prompt-left":
        raise OptionError("`max_prompt_length` is used only by `truncation` prompt-left.")
    if not 0 < max_prompt_length < max_length:
        raise OptionError(
            f"`max_prompt_length` {max_prompt_length}: expected 1 to {max_length - 1}, below `max_length`."
        )


def check_template_date(value: str | None) -> None:
    """Raise `OptionError` for a `template_date` that is no day."""
    try:
        date.fromisoformat(value or "2026-11-28")
    except ValueError as error:
        raise OptionError(f"`template_date` {value}: expected a day, such as 2026-11-28.") from error


def renamed_columns(entries: tuple[str, ...]) -> dict[str, str]:
    """`("prompt=question",)` as `{"prompt": "question"}`: the expected name -> the column of the data. Raises
    `OptionError`.
    """
    renamed: dict[str, str] = {}
    for entry in entries:
        expected, _, column = entry.partition("=")
        if not expected or not column:
            raise OptionError(f"`map` {entry}: expected NAME=COLUMN, for example prompt=question.")
        if expected in renamed:
            raise OptionError(
                f"`map` {entry}: {expected} is {renamed[expected]} already.\nGive each name one column."
            )
        renamed[expected] = column
    return renamed
