"""Every option of `plan`: what there is to run on, and options of `precompute` and `train`.

The options of both commands are read from their classes, with their help and their checks.
"""

from __future__ import annotations

import math
import re
from dataclasses import Field, fields, make_dataclass
from typing import Any, ClassVar

from dpo_cache.errors import OptionError
from dpo_cache.options.base import ABOVE_0, Options, number_or_auto, option
from dpo_cache.options.placement import Placement, placement_of
from dpo_cache.options.precompute import PrecomputeOptions, check_prompt_length, renamed_columns
from dpo_cache.options.train import TrainOptions

# of `precompute`: how data is read, and the reference scored
FROM_PRECOMPUTE = (
    "split", "limit", "format", "map", "tokenizer", "chat_template", "max_length", "truncation",
    "max_prompt_length", "trust_remote_code", "dtype", "stream_weights",
)  # fmt: skip
# of `train`: what decides its memory and its time
FROM_TRAIN = (
    "lora_r", "lora_targets", "quantize", "epochs", "max_steps", "batch_size", "optimizer", "max_grad_norm",
    "budget_tokens", "precision", "rounding", "gradient_checkpointing", "memory", "place",
)  # fmt: skip
READS_DATA = (
    "split", "limit", "format", "map", "tokenizer", "chat_template", "max_length", "truncation",
    "max_prompt_length",
)  # fmt: skip
PLANNED_DEVICES = ("cuda", "mps", "cpu")
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
UNITS = {"B": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(?:([KMGT])(I?)B?|B)?", re.IGNORECASE)


def size_in_bytes(name: str, value: str) -> int:
    """`24GiB` as 24 * 2^30 bytes, `24GB` as 24 * 10^9; a number without a unit is in GiB, as cards are named.

    Raises `OptionError`.
    """
    found = SIZE.fullmatch(value.strip())
    if found is None:
        raise OptionError(f"`{name}` {value}: expected a size such as 24GiB or 24GB.")
    amount, letter, binary = float(found[1]), (found[2] or "").upper(), bool(found[3])
    if letter:
        scale = (BINARY_UNITS if binary else UNITS)[letter]
    else:
        scale = 1 if value.strip().upper().endswith("B") else 2**30
    num_bytes = amount * scale
    if not 2**20 <= num_bytes <= 2**50:
        raise OptionError(f"`{name}` {value}: expected a size from 1MiB to 1024TiB, such as 24GiB.")
    return int(num_bytes)


def _taken(options_class: type[Options], names: tuple[str, ...]) -> list[tuple[str, Any, Any]]:
    known: dict[str, Field[Any]] = {entry.name: entry for entry in fields(options_class)}
    return [
        (name, known[name].type, option(known[name].default, **_settings(known[name])))
        for name in names
        if name in known
    ]


def _settings(entry: Field[Any]) -> dict[str, Any]:
    """The arguments of `option` that made this field."""
    given = {key: value for key, value in entry.metadata.items() if key != "range"}
    return {**given, "limit": entry.metadata["range"], "old": (), "required": False}


def _fields() -> list[tuple[str, Any, Any]]:
    return [
        (
            "model",
            "str",
            option(
                None,
                "Model to plan for: a local folder or a Hub id. Its weights are not read.",
                required=True,
            ),
        ),
        (
            "cache",
            "str | None",
            option(
                None,
                "Cache with the pair set: a folder or an fsspec URL.",
                positional="CACHE",
                flag="--cache",
            ),
        ),
        (
            "pairs",
            "str | None",
            option(None, "Pair set with the lengths, NAME or NAME/SPLIT. Default: the only one in --cache."),
        ),
        (
            "dataset",
            "str | None",
            option(
                None,
                "Preference data with the lengths, as `precompute` reads it. Without --cache and --dataset: "
                "prompts of 512 tokens and answers of 256.",
            ),
        ),
        (
            "gpu",
            "str | None",
            option(
                None,
                "Memory of the GPU, as in 24GiB; GB are 10^9 bytes. Default: cards of "
                f"{', '.join(map(str, CARDS))} GiB.",
                metavar="SIZE",
            ),
        ),
        (
            "ram",
            "str | None",
            option(
                None,
                "Memory of the host. Default: that of this machine if it has such a device, else any.",
                metavar="SIZE",
            ),
        ),
        (
            "tflops",
            "float | None",
            option(
                None,
                "Speed of matrix products, in 10^12 operations a second. Default: measured on this machine.",
                limit=ABOVE_0,
            ),
        ),
        (
            "link_gbs",
            "float",
            option(
                25.0,
                "Speed of copies between host and GPU, in GB/s: PCIe 4 has 25, PCIe 5 50.",
                limit=ABOVE_0,
            ),
        ),
        (
            "device",
            "str",
            option("cuda", "Kind of device to plan for.", choices=PLANNED_DEVICES),
        ),
        *_taken(PrecomputeOptions, FROM_PRECOMPUTE),
        *_taken(TrainOptions, FROM_TRAIN),
    ]


class PlanOptions(make_dataclass("_PlanFields", _fields(), bases=(Options,), frozen=True, kw_only=True)):  # type: ignore[misc]
    """Options of `dpo-cache plan`; see `dpo_cache.plan`."""

    groups: ClassVar[dict[str, str]] = {
        "split": "Data and reference, as in precompute",
        "lora_r": "Training, as in train",
    }

    def check(self) -> None:
        self._check_data()
        for name in ("gpu", "ram"):
            if getattr(self, name) is not None:
                size_in_bytes(name, getattr(self, name))
        number_or_auto("budget_tokens", self.budget_tokens)
        self._require(
            self.gpu is None or self.device != "cpu",
            f"`gpu` {self.gpu} and `device` {self.device}: there is no GPU to plan for.\nGive `ram`.",
        )
        self._check_training()

    def _check_data(self) -> None:
        self._require(
            self.dataset is None or (self.cache is None and self.pairs is None),
            "`dataset` and `cache`: the lengths are those of one of them.\nGive `dataset`, or `cache` and "
            "`pairs`.",
        )
        self._require(
            self.pairs is None or self.cache is not None,
            f"`pairs` {self.pairs}: the cache that has it is not given.\nGive `cache`.",
        )
        if self.dataset is None:
            for entry in fields(self):
                value = getattr(self, entry.name)
                self._require(
                    entry.name not in READS_DATA or value == entry.default,
                    f"`{entry.name}` {_shown(value)} is used only with `dataset`.",
                )
        renamed_columns(self.map)
        check_prompt_length(self.max_prompt_length, self.truncation, self.max_length)

    def _check_training(self) -> None:
        self._require(
            self.lora_targets == "all-linear" or self.lora_r is not None,
            f"`lora_targets` {self.lora_targets} is used only with `lora_r`.",
        )
        self._require(
            all(self.lora_targets.split(",")),
            f"`lora_targets` {self.lora_targets}: expected all-linear, or names with commas.",
        )
        self._require(
            self.rounding == "auto" or self.precision == "bf16",
            f"`rounding` {self.rounding} is used only with `precision` bf16, which updates in bf16.",
        )
        is_adapted = self.lora_r is not None or self.quantize != "none"
        self.placement(is_adapted=is_adapted)

    def placement(self, *, is_adapted: bool) -> Placement | None:
        """Where `train` keeps its tensors with these options; None: what fits. Raises `OptionError`."""
        return placement_of(self.memory, self.entries(is_adapted=is_adapted), is_adapted=is_adapted)

    def entries(self, *, is_adapted: bool) -> str | None:
        """The entries of `place`, with those that the name of a paged optimizer stands for."""
        entries = [] if self.place is None else [self.place]
        if self.optimizer.endswith("-paged") and not is_adapted:
            entries += ["optimizer=host", "gradients=host"]
        return ",".join(entries) or None

    def gpu_bytes(self) -> int | None:
        """Bytes of the GPU; None where all cards are planned for."""
        return None if self.gpu is None else size_in_bytes("gpu", self.gpu)

    def steps(self, num_pairs: int) -> int:
        """Steps of the run over so many pairs, as `train` counts them."""
        if self.max_steps is not None:
            return int(self.max_steps)
        return max(1, math.ceil(self.epochs * math.ceil(num_pairs / self.batch_size) - 1e-9))


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
