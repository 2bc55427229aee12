"""Where the weights of layers come from: host memory, or a checkpoint's files."""

from __future__ import annotations

from typing import Protocol

import torch

from dpo_cache.lm.layerwise.held import Layout


class WeightSource(Protocol):
    """Writes the copies of a layer's tensors."""

    def fill(self, index: int, /, layout: Layout, flat: torch.Tensor) -> None:
        """Write the copies of layer `index` into flat memory of the host, each in its place."""
        ...

    def start_of(self, tensor: torch.Tensor) -> int:
        """The address of a tensor, or where it is stored in its file."""
        ...

    def close(self) -> None:
        """The weights are not needed any more."""
        ...


class HostWeights:
    """The tensors themselves, in host memory; a copy in another dtype is rounded as `tensor.to(dtype)` is."""

    @torch.no_grad()
    def fill(self, _: int, layout: Layout, flat: torch.Tensor) -> None:
        copy_all(layout, flat)

    def start_of(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()

    def close(self) -> None:
        pass


def copy_all(layout: Layout, flat: torch.Tensor) -> None:
    """Copy each tensor to its place."""
    written = set()
    for place in layout.places:
        if place.start not in written:
            place.view(flat).copy_(place.held.tensor)
            written.add(place.start)
