"""The error for a wrong keyword argument, which names the right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, TypeVar

from dpo_cache.errors import UnknownOptionError

Function = TypeVar("Function", bound=Callable[..., Any])

ALIKE = 0.75  # least share of equal letters of two names that may be one, misspelled

# What other libraries call an option
OTHER_NAMES = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "loss_type": "loss",
    "train_batch_size": "batch_size", "per_device_train_batch_size": "batch_size", "output_dir": "output",
    "model_name_or_path": "model", "lr_scheduler_type": "lr_schedule",
}  # fmt: skip
# Options of other libraries that have no counterpart, and what to give instead
OTHER_WAYS = {
    "gradient_accumulation_steps": "Give batch_size, the pairs of one update: budget_tokens, which is found "
    "by itself, decides how many of them are run at once.",
}


def unknown_option(
    name: str, function: str, names: Iterable[str], old: Mapping[str, str] | None = None
) -> UnknownOptionError:
    """The error for a keyword that the function does not have, with the nearest of its `names` or, for one of
    its `old` names, the current one.
    """
    current = {**{known: known for known in names}, **(old or {})}
    near = nearest(name, current)
    advice = f"Did you mean {current[near]}?" if near else f"`help(dpo_cache.{function})` lists the options."
    if name in OTHER_WAYS and "batch_size" in current:
        advice = OTHER_WAYS[name]
    return UnknownOptionError(f"{function}() has no option {name}.\n{advice}")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of the names that is meant: what another library calls `name`, a name that is spelled much like
    it, or one that has a word more or less at its end. None if there is none.
    """
    names = list(names)
    if OTHER_NAMES.get(name) in names:
        return OTHER_NAMES[name]
    if near := difflib.get_close_matches(name, names, n=1, cutoff=ALIKE):
        return near[0]
    longer = [
        other for other in names if f"{name}_".startswith(f"{other}_") or f"{other}_".startswith(f"{name}_")
    ]
    return longer[0] if len(longer) == 1 else None


def checks_keywords(function: Function) -> Function:
    """Decorator: a wrong keyword argument raises `UnknownOptionError`."""
    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def run(*args: Any, **given: Any) -> Any:
        for name in given:
            if name not in names:
                raise unknown_option(name, function.__name__, names)
        return function(*args, **given)

    return run  # type: ignore[return-value]
