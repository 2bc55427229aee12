"""Every option of `export` and `import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from dpo_cache.options.base import Options, cache_argument, option
from dpo_cache.options.precompute import (
    FORMATS,
    RANKED_FORMATS,
    TRUNCATIONS,
    check_prompt_length,
    check_template_date,
    renamed_columns,
)

EXPORT_FORMATS = ("auto", "parquet", "jsonl", "datasets")
FORMAT_OF_ENDING = {".parquet": "parquet", ".jsonl": "jsonl"}
IMPORT_FORMATS = ("auto", "ids", *(name for name in FORMATS if name not in ("auto", *RANKED_FORMATS)))
IMPORT_DTYPES = ("unknown", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options of `dpo-cache export`; see `dpo_cache.exchange.export_pairs`."""

    cache: str = cache_argument("Cache with the pair set: a folder or an fsspec URL.")
    pairs: str = option(
        None,
        "Pair set to export, NAME or NAME/SPLIT.",
        positional="NAME/SPLIT",
        flag="--pairs",
        required=True,
    )
    output: str = option(
        None,
        "File to write, or folder for --format datasets.",
        positional="OUTPUT",
        flag="--output",
        required=True,
        old=("out",),
    )
    format: str = option(
        "auto",
        "auto: parquet or jsonl by the ending of OUTPUT, datasets (a folder for `load_from_disk`) "
        "without one.",
        choices=EXPORT_FORMATS,
    )
    token_logps: bool = option(False, "Add the log-prob of each token.", flag="--token-logps")
    text: bool = option(
        True,
        "Add prompt, chosen and rejected, if the source is available and makes the same pairs.",
        flag="--text/--no-text",
    )
    dataset: str | None = option(
        None, "Where the source data is now. Default: where it was when the pair set was made."
    )
    tokenizer: str | None = option(
        None, "Where the tokenizer is now. Default: where it was when the pair set was made."
    )
    overwrite: bool = option(False, "Replace the output if it is there.", flag="--overwrite")

    @property
    def output_format(self) -> str:
        """parquet, jsonl or datasets: `format` or, for auto, by the output's ending."""
        if self.format != "auto":
            return self.format
        return FORMAT_OF_ENDING.get(PurePath(self.output).suffix.lower(), "datasets")

    def check(self) -> None:
        for name in ("dataset", "tokenizer"):
            self._require(
                self.text or not getattr(self, name),
                f"`{name}` is used only for the text: leave out `text=False`.",
            )
        self._require(
            self.format != "auto" or PurePath(self.output).suffix.lower() in ("", *FORMAT_OF_ENDING),
            f"{self.output}: no format has this ending.\n"
            "End it in .parquet or .jsonl, in nothing for a folder, or name one with `format`.",
        )


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """Options of `dpo-cache import`; see `dpo_cache.exchange.import_pairs`."""

    cache: str = cache_argument("Cache to write to: a folder or an fsspec URL.")
    dataset: str = option(
        None,
        "Pairs with ref_chosen_logps and ref_rejected_logps: a file, a folder, or a Hub id.",
        positional="DATASET",
        flag="--dataset",
        required=True,
    )
    reference: str = option(None, "Name for the model that computed the log-probs.", required=True)
    name: str | None = option(None, "Name of the pair set. Default: the data's name.")
    split: tuple[str, ...] = option(
        (), "Split of the data; may be repeated. Default: train, or the only one."
    )
    format: str = option(
        "auto",
        "Format of the data. auto: ids if it has prompt_ids, chosen_ids and rejected_ids.",
        choices=IMPORT_FORMATS,
    )
    map: tuple[str, ...] = option(
        (), "Give a column its name here, as in ref_chosen_logps=reference_chosen_logps; may be repeated."
    )
    model: str | None = option(
        None,
        "Checkpoint of that model, if available: a folder or a Hub id. Training starts from it by default.",
    )
    tokenizer: str | None = option(
        None, "Tokenizer that makes (or made) the token ids: a folder or a Hub id. Default: the model's."
    )
    chat_template: str | None = option(
        None,
        "File with a Jinja chat template, instead of the tokenizer's; or the name of one of the tokenizer's "
        "own.",
    )
    template_date: str | None = option(
        None,
        "Day that the chat template wrote, as in 2026-11-28, if it writes one. Default: that of the pair "
        "set's first import, or today.",
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the tokenizer.", flag="--trust-remote-code"
    )
    dtype: str = option(
        "unknown", "Dtype of the forward pass that made the log-probs.", choices=IMPORT_DTYPES
    )
    max_length: int | None = option(
        None,
        "Longest prompt + answer when they were made. Default: 1024 for text; token ids are not cut.",
        limit=(lambda value: value >= 2, "at least 2"),
    )
    truncation: str = option("keep-start", "How longer rows were cut.", choices=TRUNCATIONS)
    max_prompt_length: int | None = option(
        None, "Tokens a prompt kept under prompt-left. Default: half of --max-length."
    )
    overwrite: bool = option(
        False,
        "Replace a pair set of that name that was made from another source or by another reference.",
        flag="--overwrite",
        old=("replace",),
    )

    def check(self) -> None:
        check_prompt_length(self.max_prompt_length, self.truncation, self.max_length or 1024)
        renamed_columns(self.map)
        check_template_date(self.template_date)
