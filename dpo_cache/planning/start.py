"""Check the cache, pair sets, models and files of a command's options before torch is imported.

The functions that do the work repeat these checks, with the same errors; here they fail before a slow import.
"""

from __future__ import annotations

from pathlib import Path

from dpo_cache.errors import DataError, ModelError, OptionError
from dpo_cache.files.locations import (
    check_dataset,
    check_model,
    check_no_url,
    check_output,
    check_peft_config,
    check_revision,
    check_tokenizer,
    is_path,
)
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.exchange import ExportOptions, ImportOptions
from dpo_cache.options.plan import PlanOptions
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.train import TEMPLATES, TrainOptions
from dpo_cache.options.upkeep import VerifyOptions
from dpo_cache.packages import check_bitsandbytes, check_ray
from dpo_cache.store import Cache, open_cache
from dpo_cache.store.cache import check_name
from dpo_cache.store.starting_model import default_start

# The options of `train` that `check_train` reads
TRAIN_INPUTS = (
    "cache", "output", "pairs", "eval_pairs", "reference", "resume", "model", "chat_template", "peft_config",
    "quantize", "optimizer",
)  # fmt: skip


def check_precompute(options: PrecomputeOptions) -> None:
    """Raise `DpoCacheError` for a wrong path or name, a package that is missing, an unusable `cache`, or one
    without the reference.
    """
    if options.name:
        check_name(options.name)
    if options.ray is not None:
        check_ray()
    _check_quantize(options.quantize)
    cache = open_cache(options.cache, create=True)
    if not options.dry_run:
        _check_new(cache)
    if options.reference:
        cache.find_reference(options.reference)
    check_model(options.model)
    check_revision(options.model, options.revision)
    check_dataset(options.dataset)
    _check_tokenizer(options.tokenizer, options.chat_template)


def check_plan(options: PlanOptions) -> None:
    """Raise `DpoCacheError` where the model, the pair set or the data set does not exist."""
    check_model(options.model)
    if options.cache is not None:
        open_cache(options.cache).choose_pairs(options.pairs, "to plan for")
    if options.dataset is not None:
        check_dataset(options.dataset)
    _check_tokenizer(options.tokenizer, options.chat_template)


def check_train(options: TrainOptions) -> None:
    """Raise `DpoCacheError` where the cache lacks a pair set or reference, a path is wrong, or a package is
    missing.
    """
    check_no_url(options.output)
    _check_quantize(options.quantize)
    if options.optimizer.startswith("adamw-8bit"):
        check_bitsandbytes(f"`optimizer` {options.optimizer}")
    cache = open_cache(options.cache)
    eval_pairs = cache.pairs(options.eval_pairs) if options.eval_pairs else None
    pairs = cache.choose_pairs(
        options.pairs, "to train on", besides=None if eval_pairs is None else eval_pairs.name
    )
    if options.reference:
        cache.check_scored_by(pairs, options.reference)
    if not options.resume:  # the checkpoint of a resumed run has the model
        if options.model:
            check_model(options.model)
        else:
            default_start(cache.read_reference(pairs.reference_id))
        if options.chat_template not in TEMPLATES:
            _check_template(options.chat_template)
    if options.peft_config and not options.resume:
        check_peft_config(options.peft_config)


def check_eval(options: EvalOptions) -> None:
    """Raise `DpoCacheError` where the cache lacks a pair set or reference, or a path is wrong."""
    cache = open_cache(options.cache)
    pairs = cache.choose_pairs(options.pairs, "to evaluate on")
    if options.reference:
        cache.check_scored_by(pairs, options.reference)
    check_model(options.model)
    check_revision(options.model, options.revision)
    if options.output and options.output_format:
        check_output(options.output, options.output_format, overwrite=options.overwrite)


def check_verify(options: VerifyOptions) -> None:
    """Raise `DpoCacheError` where there is no cache or, with `rescore`, no model."""
    open_cache(options.cache)
    if options.model:
        check_model(options.model)
        check_revision(options.model, options.revision)


def check_export(options: ExportOptions) -> None:
    """Raise `DpoCacheError` where the pair set does not exist, or the output does."""
    open_cache(options.cache).pairs(options.pairs)
    check_output(options.output, options.output_format, overwrite=options.overwrite)


def check_import(options: ImportOptions) -> None:
    """Raise `DpoCacheError` where a path is wrong, or no cache can be made at `cache`."""
    if options.name:
        check_name(options.name)
    _check_new(open_cache(options.cache, create=True))
    check_dataset(options.dataset)
    if options.model:
        check_model(options.model)
    _check_tokenizer(options.tokenizer, options.chat_template)


def _check_new(cache: Cache) -> None:
    """Raise `DpoCacheError` where a new cache cannot be made, or would end with this process."""
    if str(cache).startswith("memory://"):
        raise OptionError(
            f"`cache` {cache}: would be lost when this command ends.\n"
            "Give a folder, or another URL of fsspec."
        )
    cache.check_writable()


def _check_quantize(quantize: str) -> None:
    if quantize != "none":
        check_bitsandbytes(f"`quantize` {quantize}", ModelError)


def _check_tokenizer(tokenizer: str | None, chat_template: str | None) -> None:
    if tokenizer:
        check_tokenizer(tokenizer)
    if chat_template:
        _check_template(chat_template)


def _check_template(choice: str) -> None:
    """Raise `DataError` for a path without a file. A word may be the name of one of the tokenizer's own
    templates, which are known when the tokenizer is loaded.
    """
    if not Path(choice).is_file() and (is_path(choice) or Path(choice).suffix):
        raise DataError(f"`chat_template` {choice}: not readable (no such file).")
