"""What the option classes of all commands are made of, and the options of `precompute`: name, type, default, unit, help and check, in one place.

The command line is made from these classes, the Python functions take the same names as keyword
arguments, and a run writes them as JSON beside its output.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

from dpo_cache.errors import OptionError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "8bit", "4bit")
ATTENTIONS = ("auto", "forest", "rows")
TRUNCATIONS = ("keep-start", "keep-end", "prompt-left", "drop")
FORMATS = ("auto", "text", "conversation", "implicit", "sharegpt", "alpaca", "question", "ranked")
RANKED_PAIRS = ("all", "best")


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), flag: str = "", required: bool = False, metavar: str = "") -> Any:
    """A dataclass field with its help text, accepted values and, where they differ from name and type, its flag and what the help calls its value."""
    metadata = {"help": help, "choices": choices, "flag": flag, "required": required, "positional": "", "metavar": metavar}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(name: str) -> str:
    """The flag of an option that can be turned off as well, as one from a config file may have to be."""
    return f"--{name}/--no-{name}"


def argument(default: Any, help: str, *, name: str, choices: tuple[str, ...] = (), required: bool = False) -> Any:
    """A dataclass field that is given by its place on the command line, under this name in the help; a tuple takes all that is left."""
    metadata = {"help": help, "choices": choices, "flag": name, "required": required, "positional": name}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of the option classes: checks choices, then what `check` adds.

    `groups` names the parts of a long help: the first option of a part -> its title.
    """

    groups: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, entry.name), entry.metadata["choices"]
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, entry.name, value)
            if entry.default_factory is not MISSING:  # may be given several times
                several = (value,) if isinstance(value, str) else value
                is_text = isinstance(several, (tuple, list)) and all(isinstance(one, str) for one in several)
                if not is_text and entry.type == "tuple[str, ...]":
                    raise OptionError(f"{flag_of(entry)} {value!r}: expected text, or a list of texts.")
                object.__setattr__(self, entry.name, tuple(several))
            if entry.type in ("str", "str | None") and type(value) is int:
                value = str(value)
                object.__setattr__(self, entry.name, value)
            if entry.type in ("int", "int | None") and value is not None and type(value) is not int:
                raise OptionError(f"{flag_of(entry)} {value!r}: expected a whole number.")
            if value is None and not entry.metadata["required"] and entry.type in ("int", "float", "str", "bool"):
                raise OptionError(f"{flag_of(entry)} None: expected a value.")
            if entry.type == "bool" and not isinstance(value, bool):
                raise OptionError(f"{flag_of(entry)} {value!r}: expected true or false.")
            if entry.type in ("float", "float | None") and value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise OptionError(f"{flag_of(entry)} {value!r}: expected a number.")
            if entry.type in ("str", "str | None") and value is not None and not isinstance(value, str):
                raise OptionError(f"{flag_of(entry)} {value!r}: expected text.")
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
    quantize: str = option(
        "none", "Score the model with its weights in 8 or 4 bits (bitsandbytes), as `train --quantize` holds them.", choices=QUANTIZATIONS
    )
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
