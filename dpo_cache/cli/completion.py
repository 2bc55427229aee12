"""Values of options for shell completion; for options without known values, the shell completes file names.

`dpo-cache --install-completion` installs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import Any

import typer

from dpo_cache.losses.table import LOSSES

PAIR_SETS = ("pairs", "eval_pairs")  # options that name a pair set of the cache


def completion_of(entry: Field[Any]) -> Callable[..., list[str]] | None:
    """A function for typer that returns the values that begin with the given word; None if any value is
    possible.
    """
    if entry.name in PAIR_SETS:
        return _pair_sets
    values = tuple(LOSSES) if entry.name == "loss" else entry.metadata["choices"]
    if not values:
        return None

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def _pair_sets(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the pair sets of the cache that the command line names, if it is a folder of this machine."""
    named = (ctx.params.get(name) for name in ("cache", "cache__flag"))
    cache = next(filter(None, (*named, *ctx.args)), None)  # args: words without a parameter yet
    if cache is None or "://" in cache:
        return []
    manifests = Path(cache).expanduser().glob("pairs/*/*/manifest.json")
    names = sorted("/".join(path.parts[-3:-1]) for path in manifests)
    return [name for name in names if name.startswith(incomplete)]
