"""Several processes that train one policy together, over torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from dpo_cache.training.ranks import Ranks

TIMEOUT_S = 1800.0  # a collective call waits so long for other ranks: the main rank may write to a slow disk
TIMEOUT_VARIABLE = "DPO_CACHE_RANK_TIMEOUT"  # seconds, in place of those

Value = TypeVar("Value")


class ProcessRanks(Ranks):
    """The ranks of the default process group, which has been initialised.

    Values travel over a gloo group of their own, whatever the devices: they never mix with the reductions of
    gradients, and the host does not wait for a GPU.
    """

    def __init__(self, device: str | None = None, *, shards: bool = False):
        self.index, self.size = distributed.get_rank(), distributed.get_world_size()
        self.device, self.shards = device, shards
        self._values = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s()))

    def gather(self, value: Value) -> list[Value]:
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self._values)
        return found

    def share(self, value: Value) -> Value:
        found: list[Any] = [value]
        distributed.broadcast_object_list(found, src=0, group=self._values)
        return found[0]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def timeout_s() -> float:
    """Seconds that a collective call waits for other ranks."""
    return float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT_S))
