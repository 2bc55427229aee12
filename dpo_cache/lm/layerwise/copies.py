"""The copies of a model's tensors on the device: which tensors need one, and the leaves among them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.graph import increment_version

from dpo_cache.lm.layerwise.held import CACHE_LINE, Held, Layout, copy_of, exchanged, lay_out


class Copies:
    """Those of one model on one device.

    `compute_dtype` is the dtype of the copies of float32 weights that mixed precision multiplies: exactly
    what autocast would make of them; their gradients are added up in float32. With `copies_all`, tensors that
    are on the device have copies, too.
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

    def forget(self) -> None:
        """Forget all leaves."""
        self._leaves.clear()

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Return whether it is on the device, which may be without its number."""
        there = tensor.device
        return there.type == self.device.type and self.device.index in (None, there.index)

    def layout(
        self,
        tensors: Sequence[Held],
        matrices: set[int],
        start_of: Callable[[torch.Tensor], int] = torch.Tensor.data_ptr,
    ) -> Layout:
        """A place for each tensor that is not on the device, or not in the dtype of its copy.

        `matrices` are the ids of the weights that mixed precision multiplies (`matrices_of`). On a CPU, the
        copies start where the tensors start by `start_of`, by the multiples of a cache line.
        """
        chosen = []
        for held in tensors:
            dtype = held.tensor.dtype
            if id(held.tensor) in matrices and dtype == torch.float32 and self._compute_dtype is not None:
                dtype = self._compute_dtype
            if self._copies_all or not self.is_here(held.tensor) or dtype != held.tensor.dtype:
                is_same = self.device.type == "cpu" and dtype == held.tensor.dtype
                start = start_of(held.tensor) % CACHE_LINE if is_same and not is_fake(held.tensor) else 0
                chosen.append((held, dtype, 0 if start % dtype.itemsize else start))
        return lay_out(chosen)

    @contextmanager
    def in_place(
        self, key: Hashable, layout: Layout, flat: torch.Tensor, *, is_reused: bool = False
    ) -> Iterator[None]:
        """While open, the copies in flat memory are in the places of their tensors.

        Where the memory `is_reused` afterwards, a backward pass that comes too late is an error of torch.
        """
        leaves = self.leaves(key)
        copies = list[tuple[Held, torch.Tensor]]()
        by_tensor: dict[int, torch.Tensor] = {}
        for place in layout.places:
            held = place.held
            copy = by_tensor.get(id(held.tensor))
            if copy is None:
                copy = copy_of(held.tensor, place.view(flat))
                if copy.requires_grad:
                    is_rounded = place.dtype != held.tensor.dtype
                    leaf = _leaf_in(held.tensor.dtype, copy) if is_rounded else copy
                    leaf.grad = leaves[held.name].grad if held.name in leaves else None
                    leaves[held.name] = leaf
                    copy = _as_function_of(leaf, copy) if is_rounded else copy
                by_tensor[id(held.tensor)] = copy
            copies.append((held, copy))
        try:
            with exchanged(copies):
                yield
        finally:
            if is_reused:
                increment_version([copy for _, copy in copies])


def leaf_of(copy: torch.Tensor) -> torch.Tensor:
    """Where the gradient of a copy, or of any parameter, is added up."""
    return copy if copy.grad_fn is None else copy.grad_fn.next_functions[0][0].variable  # type: ignore[union-attr,no-any-return]


def _leaf_in(dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """A leaf of this dtype for the gradient of a tensor; it has no values, and takes no memory."""
    return torch.empty((), dtype=dtype, device=like.device).expand(like.shape).requires_grad_()


@torch.enable_grad()
def _as_function_of(leaf: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """The copy, whose gradient is added up in the leaf, in the leaf's dtype: as autocast does."""
    copy = _Cast.apply(leaf, copy.detach())
    return copy


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if ctx.leaf.grad is None:
            return grads[0].to(ctx.leaf.dtype), None
        ctx.leaf.grad.add_(grads[0])  # without a copy in the leaf's dtype, which would be twice as large
        return None, None
