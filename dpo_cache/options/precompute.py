"""Every option of `precompute`: name, type, default, unit, help and check."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cache.errors import OptionError
from dpo_cache.options.base import (
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
FORMATS = ("auto", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "ranked")
RANKED_PAIRS = ("all", "best")


@dataclass(frozen=True, kw_only=True)
class PrecomputeOptions(Options):
    """Options of `dpo-cache precompute`; see `dpo_cache.precompute`."""

    model: str = option(None, "Reference model: a local folder or a Hub id.", required=True)
    dataset: str = option(
        None, "Preference data: a .jsonl, .json, .csv or .parquet file, a folder, or a Hub id.", required=True
    )
    cache: str = cache_argument(
        "Cache to read and write: a folder, or an fsspec URL such as s3://bucket/cache."
    )
    name: str | None = option(None, "Name of the pair set. Default: the data's name.")
    split: tuple[str, ...] = option(
        (), "Split of the data; may be repeated. Default: train, or the only one."
    )
    limit: int | None = option(None, "Read only the first N rows of each split.")
    streaming: bool = option(
        False, "Read the data as a stream, a window at a time, instead of whole.", flag="--streaming"
    )
    window: int = option(
        16384,
        "Pairs that are sorted, scored and joined at once: bounds the memory of everything but the model.",
    )
    format: str = option("auto", "Format of the data. auto: recognised from the columns.", choices=FORMATS)
    map: tuple[str, ...] = option(
        (), "Give a column the name a format expects, as in prompt=question; may be repeated."
    )
    ranked_pairs: str = option(
        "all", "Pairs made of ranked answers: all, or the best against each.", choices=RANKED_PAIRS
    )
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    reference: str | None = option(
        None,
        "Id (or its first characters) of the reference in the cache that the model must be.",
        old=("expect_reference",),
    )
    tokenizer: str | None = option(None, "Tokenizer, if it is not the model's own: a folder or a Hub id.")
    chat_template: str | None = option(None, "File with a Jinja chat template, instead of the tokenizer's.")
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
    max_length: int = option(1024, "Longest prompt + answer, in tokens.")
    truncation: str = option("keep-start", "What happens to longer rows.", choices=TRUNCATIONS)
    max_prompt_length: int | None = option(
        None, "Tokens a prompt keeps under prompt-left. Default: half of --max-length."
    )
    budget_tokens: str = option("auto", "Tokens run through the model at once: auto or a number.")
    dry_run: bool = option(
        False,
        "Survey the data and report what would be scored; load no model, write nothing.",
        flag="--dry-run",
    )
    attention: str = option(
        "auto",
        "forest shares prefixes, rows pads. auto: forest if a check shows that it is exact.",
        choices=ATTENTIONS,
    )

    def check(self) -> None:
        self._require(
            self.limit is None or self.limit > 0, f"`limit` {self.limit}: expected a positive number of rows."
        )
        self._require(
            self.max_length >= 2,
            f"`max_length` {self.max_length}: a prompt token and an answer token need at least 2.",
        )
        if self.max_prompt_length is not None:
            self._require(
                self.truncation == "prompt-left",
                "`max_prompt_length` is used only by `truncation` prompt-left.",
            )
            self._require(
                0 < self.max_prompt_length < self.max_length,
                f"`max_prompt_length` {self.max_prompt_length}: expected 1 to {self.max_length - 1}, "
                "below `max_length`.",
            )
        self._require(self.window > 0, f"`window` {self.window}: expected a positive number of pairs.")
        renamed_columns(self.map)
        number_or_auto("budget_tokens", self.budget_tokens)


def renamed_columns(entries: tuple[str, ...]) -> dict[str, str]:
    """`("prompt=question",)` as `{"prompt": "question"}`: the name expected -> the column's own. Raises
    `OptionError`.
    """
    parts = [entry.partition("=") for entry in entries]
    for entry, (expected, _, column) in zip(entries, parts, strict=True):
        if not expected or not column:
            raise OptionError(f"`map` {entry}: expected NAME=COLUMN, for example prompt=question.")
    renamed: dict[str, str] = {}
    for expected, _, column in parts:
        if expected in renamed:
            raise OptionError(
                f"`map` {expected}={column}: {expected} is {renamed[expected]} already.\n"
                "Give each name one column."
            )
        renamed[expected] = column
    return renamed
