"""Keys and values of a stream's open path, of which only one layer's are on the device at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

Buffers = dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values, by attention module


class CarriedPaths:
    """`current` has the buffers of the layer that runs, which the plans of a stream's chunks share.

    Between two windows, those of all layers are on the host, as far as the next window continues the path.
    """

    def __init__(self, device: torch.device):
        self.current: Buffers = {}
        self._device = device
        self._kept: dict[int, dict[int, list[tuple[torch.Tensor, torch.Size]]]] = {}  # by layer, by module

    @contextmanager
    def of(self, index: int, next_depth: int) -> Iterator[None]:
        """While open, `current` is that of a layer; the first `next_depth` tokens of its path are kept."""
        self.current.clear()
        for module, kept in self._kept.pop(index, {}).items():
            keys, values = (self._restored(front, shape) for front, shape in kept)
            self.current[module] = keys, values
        yield
        if next_depth:
            self._kept[index] = {
                module: [(_front(one, next_depth).to("cpu", copy=True), one.shape) for one in buffers]
                for module, buffers in self.current.items()
            }
        self.current.clear()

    def _restored(self, front: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        whole = torch.zeros(shape, dtype=front.dtype, device=self._device)
        _front(whole, front.shape[_depth_dim(front)]).copy_(front)
        return whole


def _depth_dim(buffer: torch.Tensor) -> int:
    """Plans have buffers [1, K, depth, E] or [depth, K, E]."""
    return 2 if buffer.ndim == 4 else 0


def _front(buffer: torch.Tensor, depth: int) -> torch.Tensor:
    return buffer.narrow(_depth_dim(buffer), 0, depth)
