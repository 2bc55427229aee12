"""Exchange of values during a run that any rank may end because it runs out of memory."""

from __future__ import annotations

from typing import TypeVar

import torch

from dpo_cache.errors import first_line
from dpo_cache.training.ranks import Ranks

Value = TypeVar("Value")


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Memory ran out on another rank."""


def exchange(ranks: Ranks, value: Value) -> list[Value]:
    """The value of each rank. Raises `OutOfMemoryElsewhere` if one calls `end_run` instead."""
    found = ranks.gather(("", value))
    for index, (problem, _) in enumerate(found):
        if problem:
            raise OutOfMemoryElsewhere(f"rank {index}: {problem}")
    return [value for _, value in found]


def end_run(ranks: Ranks, error: RuntimeError) -> None:
    """Make all ranks leave the run at their next exchange, after an out-of-memory error on any rank."""
    if not isinstance(error, OutOfMemoryElsewhere):
        ranks.gather((first_line(error), None))
