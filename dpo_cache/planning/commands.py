"""The commands of a plan, for the user to copy."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

from dpo_cache.options.base import flag_of
from dpo_cache.options.plan import FROM_PRECOMPUTE, FROM_TRAIN, PlanOptions
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.train import TrainOptions


def precompute_command(options: PlanOptions, **chosen: Any) -> str:
    """The `dpo-cache precompute` command with the options of the plan and the `chosen` ones."""
    start = ["--model", options.model, "--dataset", options.dataset or "DATA"]
    start += ["--cache", options.cache or "CACHE"]
    given = _given(options, (*FROM_PRECOMPUTE, "budget_tokens"))
    return _command("precompute", start, given | chosen, PrecomputeOptions)


def train_command(options: PlanOptions, **chosen: Any) -> str:
    """The `dpo-cache train` command with the options of the plan and the `chosen` ones."""
    start = ["--model", options.model, "--cache", options.cache or "CACHE"]
    start += ["--pairs", options.pairs] if options.pairs else []
    given = _given(options, (*FROM_TRAIN, "trust_remote_code"))
    return _command("train", [*start, "--output", "RUN"], given | chosen, TrainOptions)


def _given(options: PlanOptions, names: tuple[str, ...]) -> dict[str, Any]:
    """The named options that differ from their defaults."""
    known = {entry.name: entry for entry in fields(options)}
    return {
        name: getattr(options, name)
        for name in names
        if name in known and getattr(options, name) != known[name].default
    }


def _command(name: str, start: list[str], values: dict[str, Any], options_class: Any) -> str:
    entries = {entry.name: entry for entry in fields(options_class)}
    words = ["dpo-cache", name, *start]
    for key, value in values.items():
        flag = flag_of(entries[key])
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [word for one in value for word in (flag, one)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join(words)
