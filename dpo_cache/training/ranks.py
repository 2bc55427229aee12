"""The processes that train one policy together, called ranks; a run on one device has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


class Ranks:
    """The ranks of a run, seen from one of them: here a single one. `distributed.py` has several.

    Every method is called by all ranks, in the same order; a value must be picklable.
    """

    index = 0
    size = 1
    device: str | None = None  # of this rank, such as cuda:1; None: the option decides
    shards = False  # whether weights, gradients and state are cut into a shard a rank (FSDP2)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files and its remarks."""
        return self.index == 0

    def gather(self, value: Value) -> list[Value]:
        """The value of each rank, in their order."""
        return [value]

    def share(self, value: Value) -> Value:
        """The value of the main rank."""
        return self.gather(value)[0]

    def any(self, flag: Any) -> bool:
        """Whether the flag is true on some rank."""
        return any(self.gather(bool(flag)))

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; each rank has tensors of the same shapes."""
