"""Several processes that train one policy together, over torch.distributed."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import cast

import torch.distributed as dist

from dpo_cache.training.ranks import Ranks, Value

TIMEOUT_S = 1800.0  # a collective call waits so long for other ranks: the main rank may write to a slow disk
TIMEOUT_VARIABLE = "DPO_CACHE_RANK_TIMEOUT"  # seconds, in place of those


class ProcessRanks(Ranks):
    """The ranks of the default process group, which is initialised.

    Values travel over a gloo group of their own, whatever the devices: they never mix with the reductions of
    gradients, and the host does not wait for a GPU.
    """

    def __init__(self, *, device: str | None = None, shards: bool = False):
        self.index, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.shards = device, shards
        self._values = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s()))

    def gather(self, value: Value) -> list[Value]:
        """The value of each rank, in their order."""
        found: list[Value | None] = [None] * self.size
        dist.all_gather_object(found, value, group=self._values)
        return cast("list[Value]", found)


def timeout_s() -> float:
    """Seconds that a collective call waits for other ranks."""
    return float(os.environ.get(TIMEOUT_VARIABLE, TIMEOUT_S))
