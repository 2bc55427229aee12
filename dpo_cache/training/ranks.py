"""The processes that train one policy together, called ranks; a run on one device has one."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import distributed

from dpo_cache.errors import DpoCacheError, OptionError, TrainingError
from dpo_cache.options.train import TrainOptions
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.training.launch import launched_rank

Value = TypeVar("Value")


class Ranks:
    """The ranks of a run, seen from one of them. This class has a single rank; `distributed.py` has several.

    Every method is called by all ranks, in the same order; a value must be picklable.
    """

    index = 0
    size = 1
    device: str | None = None  # this rank's device, such as cuda:1; None: the option decides
    shards = False  # True if each rank has a shard of weights, gradients and state (FSDP2)

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes the run's files and its remarks."""
        return self.index == 0

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks."""
        return [value]

    def first_problem(self, problem: str) -> str:
        """The first problem that a rank describes; empty if none does."""
        return next(filter(None, self.gather(problem)), "")

    def share(self, value: Value) -> Value:
        """The value of the main rank."""
        return self.gather(value)[0]

    def on_main(self, function: Callable[[], Value]) -> Value:
        """The result of the function, which is called on the main rank only. Its `DpoCacheError` is raised on
        all.
        """
        found: tuple[Any, DpoCacheError | None] = None, None
        if self.is_main:
            try:
                found = function(), None
            except DpoCacheError as error:
                if self.size == 1:
                    raise
                found = None, error
        value, problem = self.share(found)
        if problem is not None:
            raise problem
        return value  # type: ignore[no-any-return]

    def any(self, flag: Any) -> bool:
        """Return whether the flag is true on some rank."""
        return any(self.gather(bool(flag)))

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; each rank has tensors of the same shapes."""

    def collect(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of each rank, on the main rank; nothing on the others. All have the same shape."""
        return [tensor]


@contextmanager
def open_ranks(options: TrainOptions) -> Iterator[Ranks]:
    """The ranks of a run: those that a launcher has started or, in a program that has initialised a process
    group, its processes; else one. Raises `OptionError`.
    """
    if launched_rank() is None and not (distributed.is_available() and distributed.is_initialized()):
        if (options.launch or 1) > 1:
            raise OptionError(
                f"`launch` {options.launch}: the command line starts processes, a function does not.\n"
                "Start the program with `accelerate launch` or torchrun, and leave `launch` out."
            )
        yield Ranks()
        return
    from dpo_cache.training.distributed import joined_ranks

    with joined_ranks(options.device, shards=options.parallel == "fsdp") as ranks:
        _check_same(options, ranks)
        yield ranks


def check_same_inputs(ranks: Ranks, inputs: Document) -> None:
    """Raise `TrainingError`, on all ranks, if another rank has read other inputs from the same place: the
    disks of two machines may differ.
    """
    found = ranks.gather((platform.node(), inputs))
    for index, (node, others) in enumerate(found):
        if differing := differing_fields(found[0][1], others):
            raise TrainingError(
                f"rank {index}, on {node}, has other inputs than rank 0; they differ in\n"
                + "".join(f"  {line}\n" for line in differing)
                + "Give `cache`, `model` and `output` on a disk that all machines share, or the cache as a "
                "URL and the model by its Hub id."
            )


def _check_same(options: TrainOptions, ranks: Ranks) -> None:
    """Raise `OptionError` if another rank has other options."""
    given = asdict(options)
    first = ranks.share(given)
    for name, value in given.items():
        if value != first[name]:
            raise OptionError(
                f"`{name}` {value} here, and {first[name]} on rank 0: processes that a launcher starts train "
                "one policy together, with the same options.\n"
                "Start separate trainings one by one, or in jobs of their own."
            )
