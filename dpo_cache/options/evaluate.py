"""Every option of `eval`: name, type, default, unit, help and check, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import ClassVar

from dpo_cache.options.base import (
    ATTENTIONS,
    DEVICES,
    DTYPES,
    cache_argument,
    number_or_auto,
    option,
)
from dpo_cache.options.losses import LossOptions

OUTPUT_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class EvalOptions(LossOptions):
    """Options of `dpo-cache eval`; see `dpo_cache.evaluate`."""

    groups: ClassVar[dict[str, str]] = {**LossOptions.groups, "dtype": "Memory and speed", "output": "Output"}

    cache: str = cache_argument("Cache with the pair set: a folder or an fsspec URL.")
    model: str = option(
        None,
        "Policy to evaluate: a folder, such as RUN/model, or a Hub id. Default: RUN/model of --run.",
        required=True,
    )
    run: str | None = option(
        None,
        "Folder of a training run, for its loss settings. Default: the run whose model/ or best/ is --model, "
        "if any.",
    )
    pairs: str | None = option(
        None, "Pair set to evaluate on, NAME or NAME/SPLIT. Default: the only one in the cache."
    )
    limit: int | None = option(
        None,
        "Take only the first N pairs.",
        limit=(lambda value: value > 0, "a positive number of pairs"),
    )
    reference: str | None = option(
        None, "Id (or its first characters) of the reference that the pairs must have been scored by."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model.", flag="--trust-remote-code"
    )
    dtype: str = option(
        "auto",
        "Dtype of the forward pass. auto: the checkpoint's on a GPU, float32 on a CPU.",
        choices=DTYPES,
    )
    device: str = option("auto", "Where to compute. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    budget_tokens: str = option("auto", "Tokens run through the model at once: auto or a number.")
    attention: str = option(
        "auto",
        "forest shares prefixes, rows pads. auto: forest if a check shows that it is exact.",
        choices=ATTENTIONS,
    )
    output: str | None = option(None, "File for one line a pair: .jsonl or .parquet.")
    overwrite: bool = option(False, "Replace the output if it is there.", flag="--overwrite")

    @property
    def output_format(self) -> str | None:
        """jsonl or parquet, by the output's ending; None without an output."""
        return None if self.output is None else OUTPUT_FORMATS.get(PurePath(self.output).suffix.lower())

    def check(self) -> None:
        self.check_losses()
        number_or_auto("budget_tokens", self.budget_tokens)
        self._require(
            self.output is None or self.output_format is not None,
            f"`output` {self.output}: no format has this ending.\nEnd it in .jsonl or .parquet.",
        )
        self._require(
            self.output is not None or not self.overwrite, "`overwrite` is used only with `output`."
        )
