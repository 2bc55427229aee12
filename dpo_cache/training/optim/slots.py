"""The data that an updater holds for each parameter, and the slices of the parameter's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cache.training.optim import rounding
from dpo_cache.training.optim.streaming import Pieces

VALUE, GRADIENT, REST = "value", "gradient", "rest"
TABLE = "qmap"  # prefix of the names of tables of 8-bit values, which are constants
BLOCK = 256  # values with a common scale in 8-bit state
SLICES_AT_HOME = 4  # slices of rounding at once, where none is copied: fewer launches, more memory


@dataclass(frozen=True)
class Slicing:
    """The way to run an optimizer in slices; its updates of different values, or blocks of 256, are
    independent.

    moments: the dtype of its state between updates. is_for_all: True if slices also apply to float32
    parameters that need no transfer, which other optimizers update directly.
    """

    moments: torch.dtype = torch.float32
    is_for_all: bool = False


@dataclass
class Slot:
    """A parameter, and the leaf that the optimizer updates: the parameter, or its float32 stand-in."""

    name: str
    parameter: torch.nn.Parameter
    leaf: torch.nn.Parameter
    is_sliced: bool
    is_streamed: bool  # the slices pass through a device
    counts: bool  # counts updates, so that each stochastic rounding has a different draw
    group: int = 0  # index of the leaf's group in the optimizer
    first: int = 0  # for a shard, the first row of this rank
    num_updates: int = 0
    rest: torch.Tensor | None = None  # int16, under compensated rounding

    @property
    def stands_in(self) -> bool:
        return self.leaf is not self.parameter


def make_slot(
    name: str,
    parameter: torch.nn.Parameter,
    slicing: Slicing | None,
    stream_device: torch.device | None,
) -> Slot:
    """The slot of a parameter. One on the CPU is streamed if there are a device and a slicing for it."""
    is_streamed = slicing is not None and stream_device is not None and parameter.device.type == "cpu"
    is_bf16 = parameter.dtype == torch.bfloat16
    # torch's fused AdamW reads memory in order, whatever the layout of value, gradient and state
    is_direct = parameter.is_contiguous() and not (is_bf16 or is_streamed)
    is_sliced = slicing is not None and (slicing.is_for_all or not is_direct)
    device = stream_device if is_streamed else parameter.device
    stand_in = torch.nn.Parameter(torch.empty(0, dtype=torch.float32, device=device))
    return Slot(
        name=name,
        parameter=parameter,
        leaf=stand_in if is_bf16 or is_sliced else parameter,
        is_sliced=is_sliced,
        is_streamed=is_streamed,
        counts=is_bf16 or (slicing is not None and slicing.moments == torch.bfloat16),
    )


def cut(
    slot: Slot, value: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any]
) -> Iterator[tuple[int, Pieces]]:
    """Yield the slices of a parameter's tensors, flat and in place, and the number of each one's first value.

    `value` is flat; of the state, tables and tensors without dimensions are left out.
    """
    whole = {
        key: tensor.view(-1)
        for key, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and tensor.ndim and not key.startswith(TABLE)
    }
    whole |= {VALUE: value, GRADIENT: gradient.reshape(-1)}
    if slot.rest is not None:
        whole[REST] = slot.rest.view(-1)
    at_once = rounding.SLICE * (1 if slot.is_streamed else SLICES_AT_HOME)
    for start in range(0, value.numel(), at_once):
        stop = min(start + at_once, value.numel())
        of_values, of_blocks = slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))
        yield (
            start,
            {
                key: tensor[of_blocks if key.startswith("absmax") else of_values]
                for key, tensor in whole.items()
            },
        )
