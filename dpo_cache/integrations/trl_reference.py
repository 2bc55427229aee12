"""The cache in place of TRL's reference model: choosing the reference, and keeping TRL from loading one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset
from trl import DPOConfig
from trl.trainer import dpo_trainer

from dpo_cache.errors import (
    DataError,
    FormatError,
    NewerFormatError,
    NotInCacheError,
    OptionError,
    first_line,
)
from dpo_cache.store import Cache, open_cache

UNCUT = 1_000_000  # `precompute --max-length` for a `max_length` of None


def open_reference(
    cache: str, reference: str | None, policy_name: str, args: DPOConfig, *, may_be_new: bool
) -> tuple[Cache, str | None]:
    """The cache, and the full id of its reference: the one whose id begins with `reference`, or the only one;
    None for one that is to be scored now. Raises `CacheError` with the command that makes what is missing.
    """
    advice = f"Run {scoring_command(cache, policy_name, args)} first, or give `score_missing`."
    try:
        opened = open_cache(cache, create=may_be_new)
    except NewerFormatError:
        raise
    except FormatError as error:
        raise FormatError(f"{first_line(error)}\n{advice}") from error
    known = opened.references()
    if reference is not None or len(known) == 1:
        return opened, opened.find_reference(reference or known[0])
    if known:
        shown = ", ".join(one[:12] for one in known)
        raise NotInCacheError(f"{cache}: {len(known)} references.\nName one with `reference`: {shown}.")
    if may_be_new:
        return opened, None
    raise NotInCacheError(f"{cache}: no references.\n{advice}")


def scoring_command(cache: str, policy_name: str, args: DPOConfig) -> str:
    """The command, in backticks, that scores the completions of a data set as TRL cuts them."""
    cut = {"keep_end": ["--truncation", "keep-end"]}.get(args.truncation_mode, [])
    length = str(args.max_length or UNCUT)
    words = ["--cache", cache, "--model", policy_name, "--max-length", length, *cut]
    return f"`dpo-cache precompute {shlex.join(words)} --dataset DATA`"


def check_reference(args: DPOConfig, rows: Any) -> None:
    """Raise `OptionError` for a reference, or for rows, whose log-probs a cache cannot have."""
    if args.sync_ref_model:
        raise OptionError(
            "`sync_ref_model` changes the reference during training; the cache has the log-probs of one that "
            "does not change.\nLeave `sync_ref_model` out, or use TRL's DPOTrainer."
        )
    if isinstance(rows, (Dataset, IterableDataset)) and {"image", "images"} & set(next(iter(rows), {})):
        raise OptionError(
            "The rows have images, and the cache has log-probs of text only.\nRemove the column, or use "
            "TRL's DPOTrainer."
        )


def check_has_rows(rows: Any, name: str) -> None:
    """Raise `DataError` for a data set without rows, also for one of several by their names."""
    if isinstance(rows, dict):
        for key, one in rows.items():
            check_has_rows(one, f"{name}[{key!r}]")
    elif isinstance(rows, (Dataset, IterableDataset)) and next(iter(rows), None) is None:
        raise DataError(
            f"{name} has no rows.\nGive a data set with pairs, or leave it out if it is optional."
        )


@contextmanager
def only_the_policy(*, is_loaded: bool) -> Iterator[None]:
    """While open, TRL's trainer loads a policy, if it has none, but no reference model, with which it would
    compute log-probs under FSDP; nor does it hash the weights to name the file of those log-probs.
    """
    load, hash_weights = dpo_trainer.create_model_from_path, dpo_trainer.hash_module
    module: Any = dpo_trainer

    def load_once(*given: Any, **more: Any) -> Any:
        nonlocal is_loaded
        if is_loaded:
            return None
        is_loaded = True
        return load(*given, **more)

    module.create_model_from_path, module.hash_module = load_once, lambda _: ""
    try:
        yield
    finally:
        module.create_model_from_path, module.hash_module = load, hash_weights


def drop_reference_adapter(model: Any) -> None:
    """Remove the copy of an adapter that TRL keeps as its reference."""
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
