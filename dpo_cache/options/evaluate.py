"""Every option of `eval`: name, type, default, unit, help and check, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import ClassVar

from dpo_cache.losses.table import LOSSES, check_serves, loss_terms
from dpo_cache.options.base import (
    ATTENTIONS,
    DEVICES,
    DTYPES,
    Options,
    cache_argument,
    flag_of,
    number_or_auto,
    option,
)

OUTPUT_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Options):
    """Options of `dpo-cache eval`; see `dpo_cache.evaluate`."""

    groups: ClassVar[dict[str, str]] = {"loss": "Loss", "dtype": "Memory and speed", "output": "Output"}

    cache: str = cache_argument("Cache with the pair set: a folder or an fsspec URL.")
    model: str = option(None, "Policy to evaluate: a folder, such as RUN/model, or a Hub id.", required=True)
    pairs: str | None = option(
        None, "Pair set to evaluate on, NAME or NAME/SPLIT. Default: the only one in the cache."
    )
    limit: int | None = option(None, "Take the first N pairs alone.")
    reference: str | None = option(
        None, "Id (or its first characters) of the reference that the pairs must have been scored by."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model.", flag="--trust-remote-code"
    )
    loss: tuple[str, ...] = option(
        ("sigmoid",),
        f"{', '.join(LOSSES)}; repeated as NAME:WEIGHT it is a weighted sum. Default: sigmoid (DPO).",
    )
    beta: float = option(0.1, "As in training: what log-ratios are multiplied by to be rewards.")
    label_smoothing: float = option(0.0, "As in training, 0 to 0.5.")
    discopop_tau: float = option(0.05, "tau of DiscoPOP.")
    simpo_gamma: float = option(0.5, "Target margin of SimPO, after beta.")
    cpo_alpha: float = option(1.0, "Weight of the likelihood of the chosen answer in CPO.")
    dtype: str = option(
        "auto",
        "Dtype of the forward pass. auto: the checkpoint's on a GPU, float32 on a CPU.",
        choices=DTYPES,
    )
    device: str = option("auto", "Where to compute. auto: CUDA, then MPS, then the CPU.", choices=DEVICES)
    budget_tokens: str = option("auto", "Tokens run through the model at once: auto or a number.")
    attention: str = option(
        "auto",
        "forest shares prefixes, rows pads; auto takes the forest where it proves exact.",
        choices=ATTENTIONS,
    )
    output: str | None = option(None, "File for one line a pair: .jsonl or .parquet.")
    overwrite: bool = option(False, "Replace the output if it is there.", flag="--overwrite")

    @property
    def output_format(self) -> str | None:
        """jsonl or parquet, by the output's ending; None where no output is asked for."""
        return None if self.output is None else OUTPUT_FORMATS.get(PurePath(self.output).suffix.lower())

    def check(self) -> None:
        self._require(
            self.limit is None or self.limit > 0,
            f"--limit {self.limit}: expected a positive number of pairs.",
        )
        self._check_losses()
        number_or_auto("--budget-tokens", self.budget_tokens)
        self._require(
            self.output is None or self.output_format is not None,
            f"--output {self.output}: no format has this ending.\nEnd it in .jsonl or .parquet.",
        )
        self._require(
            self.output is not None or not self.overwrite, "--overwrite is used with --output alone."
        )

    def _check_losses(self) -> None:
        names, smoothing = tuple(loss_terms(self.loss)), self.label_smoothing
        for name in ("beta", "discopop_tau", "simpo_gamma", "cpo_alpha"):
            value = getattr(self, name)
            self._require(
                math.isfinite(value), f"--{name.replace('_', '-')} {value}: expected a finite number."
            )
        self._require(self.beta > 0, f"--beta {self.beta}: expected a number above 0.")
        for entry in fields(self):
            if (
                entry.name in ("label_smoothing", "discopop_tau", "simpo_gamma", "cpo_alpha")
                and getattr(self, entry.name) != entry.default
            ):
                check_serves(entry.name, f"{flag_of(entry)} {getattr(self, entry.name)}", names)
        self._require(0 <= smoothing <= 0.5, f"--label-smoothing {smoothing}: expected 0 to 0.5.")
        self._require(
            "robust" not in names or smoothing < 0.5,
            f"--label-smoothing {smoothing}: --loss robust expects less than 0.5.",
        )
        self._require(
            "exo_pair" not in names or smoothing > 0,
            "--loss exo_pair needs a --label-smoothing above 0; its paper takes 0.001.",
        )
        self._require(
            self.discopop_tau > 0, f"--discopop-tau {self.discopop_tau}: expected a number above 0."
        )
        self._require(self.cpo_alpha >= 0, f"--cpo-alpha {self.cpo_alpha}: expected 0 or more.")
