"""The copies of a model's tensors on the device: which tensors need one, and the leaves among them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from dpo_cache.lm.layerwise.held import Held, Layout, copy_of, exchanged, lay_out


class Copies:
    """Those of one model on one device.

    `compute_dtype` is the dtype of the copies of float32 weights that mixed precision multiplies: exactly
    what autocast would make of them. With `copies_all`, tensors that are on the device have copies, too.
    """

    def __init__(
        self, device: torch.device, compute_dtype: torch.dtype | None = None, *, copies_all: bool = False
    ):
        self.device, self._compute_dtype, self._copies_all = device, compute_dtype, copies_all
        self._leaves: dict[Hashable, dict[str, torch.Tensor]] = {}

    def leaves(self, key: Hashable) -> dict[str, torch.Tensor]:
        """The latest copies under a key of the parameters that need a gradient, by the parameter's name.

        A gradient stays with the name until the caller sets it to None, as that of a parameter does.
        """
        return self._leaves.setdefault(key, {})

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Whether it is on the device, which may be without its number."""
        there = tensor.device
        return there.type == self.device.type and self.device.index in (None, there.index)

    def layout(self, tensors: Sequence[Held], matrices: set[int]) -> Layout:
        """A place for each tensor that is not on the device, or not in the dtype of its copy.

        `matrices` are the ids of the weights that mixed precision multiplies (`matrices_of`).
        """
        chosen = []
        for held in tensors:
            dtype = held.tensor.dtype
            if id(held.tensor) in matrices and dtype == torch.float32 and self._compute_dtype is not None:
                dtype = self._compute_dtype
            if self._copies_all or not self.is_here(held.tensor) or dtype != held.tensor.dtype:
                chosen.append((held, dtype))
        return lay_out(chosen)

    @contextmanager
    def in_place(self, key: Hashable, layout: Layout, flat: torch.Tensor) -> Iterator[None]:
        """While open, the copies in flat memory are in the places of their tensors."""
        leaves = self.leaves(key)
        copies = list[tuple[Held, torch.Tensor]]()
        by_tensor: dict[int, torch.Tensor] = {}
        for place in layout.places:
            held = place.held
            copy = by_tensor.get(id(held.tensor))
            if copy is None:
                copy = by_tensor[id(held.tensor)] = copy_of(held.tensor, place.view(flat))
                if copy.requires_grad:
                    copy.grad = leaves[held.name].grad if held.name in leaves else None
                    leaves[held.name] = copy
            copies.append((held, copy))
        with exchanged(copies):
            yield
