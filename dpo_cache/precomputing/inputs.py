"""The arguments of `precompute`: paths and names, or a loaded model, tokenizer and rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.errors import ModelError, OptionError, kind_of
from dpo_cache.files.locations import check_revision
from dpo_cache.lm.model.adapter import locate_checkpoint
from dpo_cache.lm.model.architecture import check_causal
from dpo_cache.lm.model.load import load_config
from dpo_cache.lm.model.quantization import check_quantizable, check_saved_quantization
from dpo_cache.log import Log, phase
from dpo_cache.options.precompute import PrecomputeOptions, renamed_columns
from dpo_cache.precomputing.windows import SplitPlan
from dpo_cache.store.cache import check_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IN_MEMORY = "in memory"  # written to a manifest in place of a path or a Hub id


@dataclass(frozen=True)
class Inputs:
    """The options, with a name in place of each object that is loaded already, and the objects."""

    options: PrecomputeOptions
    rows: Any = None  # see `data.take_rows`
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


def take_inputs(model: Any, dataset: Any, cache: Any, tokenizer: Any, options: dict[str, Any]) -> Inputs:
    """Separate paths from loaded objects, and check the options. Raises `OptionError`."""
    loaded_model, loaded_tokenizer, rows = (
        None if isinstance(value, (str, os.PathLike)) else value for value in (model, tokenizer, dataset)
    )
    if rows is not None and not options.get("name"):
        raise OptionError(
            'rows that are loaded already have no name for their pair set.\nGive one: name="...".'
        )
    if loaded_model is not None:
        _check_loaded_model(loaded_model, tokenizer, options)
        model = loaded_model.name_or_path or f"{type(loaded_model).__name__} {IN_MEMORY}"
    checked = PrecomputeOptions(
        model=model,
        dataset=f"{type(rows).__name__} {IN_MEMORY}" if rows is not None else dataset,
        cache=cache,
        tokenizer=None if loaded_tokenizer is not None else tokenizer,
        **options,
    )
    return Inputs(checked, rows, loaded_model, loaded_tokenizer)


def read_config(inputs: Inputs) -> PreTrainedConfig:
    """The reference's config. Raises `ModelError` unless it is the config of a causal LM that can be loaded
    with the options.
    """
    options = inputs.options
    if inputs.model is not None:
        return inputs.model.config
    check_revision(options.model, options.revision)
    config = load_config(
        options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    check_causal(config, options.model)
    check_quantizable(config, options.model, options.quantize)
    check_saved_quantization(config, options.model)
    if options.device_map == "auto":
        from dpo_cache.lm.model.load_dispatched import check_dispatchable  # imports code of models

        check_dispatchable(options.model, config, options.revision, quantize=options.quantize)
    return config


@phase("reading the data")
def read_splits(inputs: Inputs, name: str, log: Log) -> list[SplitPlan]:
    """Open every split and find its format; nothing is tokenized yet. Raises `DataError`."""
    options, rename = inputs.options, renamed_columns(inputs.options.map)
    tables = (
        data.read_dataset(
            options.dataset, options.split, options.limit, streaming=options.streaming, rename=rename
        )
        if inputs.rows is None
        else data.take_rows(inputs.rows, options.split, options.limit, rename=rename, place=options.dataset)
    )
    return [_open_split(options, name, split, rows, log) for split, rows in tables.items()]


def read_tokenizer(inputs: Inputs) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer with its chat template, and its folder or Hub id. Raises `ModelError`."""
    options = inputs.options
    if inputs.tokenizer is not None:
        tokenizer = inputs.tokenizer
        if options.chat_template is not None:
            tokenizer = copy.deepcopy(tokenizer)
            data.set_chat_template(tokenizer, options.chat_template)
        return tokenizer, str(tokenizer.name_or_path or IN_MEMORY)
    location, revision = (
        (options.tokenizer, None)
        if options.tokenizer
        else locate_checkpoint(options.model, options.revision).tokenizer
    )
    tokenizer = data.load_tokenizer(
        location,
        revision=revision,
        chat_template=options.chat_template,
        trust_remote_code=options.trust_remote_code,
    )
    return tokenizer, location


def tokenize_split(
    split: SplitPlan, tokenizer: PreTrainedTokenizerBase, options: PrecomputeOptions, spool: Path, log: Log
) -> Iterator[Dataset]:
    """Yield the split's rows tokenized, a window at a time; see `data.tokenized_windows`."""
    return data.tokenized_windows(
        split.rows,
        split.survey.data_format,
        tokenizer,
        ranked_pairs=options.ranked_pairs,
        template_date=split.template_date,
        window_rows=options.window,
        spool=spool / split.name,
        place=f"{options.dataset}: split {split.name}",
        on_error=options.on_error,
        log=log,
    )


def _open_split(options: PrecomputeOptions, name: str, split: str, rows: data.Rows, log: Log) -> SplitPlan:
    check_name(split)
    place = f"{options.dataset}: split {split}"
    first = data.deciding_row(rows, place, None if options.format == "auto" else options.format)
    columns = list(rows.column_names or first)
    data_format = (
        data.detect_format(columns, first, place)
        if options.format == "auto"
        else data.check_format(options.format, columns, place)
    )
    if read_as := data.columns_read(data_format, columns, first):
        log(f"{place}: {read_as}.")
    if unused := data.unused_columns(data_format, columns, first):
        log(f"{place}: {data.unused_remark(unused, data_format)}")
    if options.ranked_pairs != "all" and data_format not in data.RANKED:
        log(f"{place}: `ranked_pairs` {options.ranked_pairs} has no effect on the format {data_format}.")
    return SplitPlan(split, rows, data.Survey(f"{name}/{split}", data_format))


def _check_loaded_model(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    """Raise `DpoCacheError` for a model that cannot be run, and for options that apply only to loading."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise OptionError(
            f"{kind_of(model)} cannot be the reference.\n"
            "Give a causal LM of transformers, or the path or Hub id of one; for an adapter, its folder."
        )
    if tokenizer is None:
        raise OptionError(
            "a model that is loaded already comes without its tokenizer.\nGive it: tokenizer=tokenizer."
        )
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(
            f"the model's weights are {str(model.dtype).removeprefix('torch.')}: log-probs are scored in "
            "float32, bfloat16 or float16.\nConvert it first: model.float()."
        )
    here = {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    for name, live in here.items():
        if options.get(name, "auto") not in ("auto", live):
            raise OptionError(
                f"{name} {options[name]}: the model is loaded already, with {name} {live}.\nLeave it out."
            )
    for name, usual in (("quantize", ("none",)), ("stream_weights", ("auto", "off"))):
        if options.get(name, usual[0]) not in usual:
            raise OptionError(
                f"{name} {options[name]}: the model is loaded already.\n"
                "Give its path or Hub id, or leave it out."
            )
