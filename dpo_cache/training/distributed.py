"""The ranks of a process group of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from dpo_cache.training.ranks import Ranks

Value = TypeVar("Value")


class ProcessRanks(Ranks):
    """The ranks of the default process group, which has been initialised."""

    def __init__(self, device: str | None = None):
        self.index, self.size = distributed.get_rank(), distributed.get_world_size()
        self.device = device

    def gather(self, value: Value) -> list[Value]:
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def share(self, value: Value) -> Value:
        found: list[Any] = [value]
        distributed.broadcast_object_list(found, src=0)
        return cast(Value, found[0])

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            distributed.all_reduce(tensor)
