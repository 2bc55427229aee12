"""The error for a wrong keyword argument, which names the right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, TypeVar

from dpo_cache.errors import UnknownOptionError

Function = TypeVar("Function", bound=Callable[..., Any])

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
    near = [other for other in [OTHER_NAMES.get(name)] if other in current]
    near = near or difflib.get_close_matches(name, current, n=1)
    advice = (
        f"Did you mean {current[near[0]]}?" if near else f"`help(dpo_cache.{function})` lists the options."
    )
    if name in OTHER_WAYS and "batch_size" in current:
        advice = OTHER_WAYS[name]
    return UnknownOptionError(f"{function}() has no option {name}.\n{advice}")


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
