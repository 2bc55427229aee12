"""Tensors that are made again in the backward pass, from what is kept anyway, where that costs next to
nothing.

The output of a norm or an activation function, or a copy of keys, takes as much memory as a matrix product's,
and a hundredth of its time. Within `recording`, what `recompute_later` gives is kept as its recipe, the
function and its inputs, wherever the backward pass asks for it: by the product that multiplies it, for one.
It is made again when that is reached, once, and its own gradient is taken of that. The same operations give
the gradients as if everything were kept; a tensor that is used beside its recipe, too, has its gradients
added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from dpo_cache.lm.device import autocast_dtype

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]
Hooks = tuple[Pack, Unpack]


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


_tape: ContextVar[RecomputeTape | None] = ContextVar("book", default=None)
_hooks: ContextVar[Hooks] = ContextVar("hooks", default=(_itself, _itself))


def recompute_later(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, parameters: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """`function(*inputs)`, which uses `parameters`, too; within `recording` it is kept as that call.

    The function gives one tensor, the same for the same inputs.
    """
    tape = _tape.get()
    if tape is None or not torch.is_grad_enabled():
        return function(*inputs)
    call = _RecordedCall(function, inputs, parameters, tape)
    output = _RecomputeLater.apply(call, *inputs, *parameters)
    tape.enter(output, call, inputs)
    return output


def is_recording() -> bool:
    """Whether recipes are kept here and now."""
    return _tape.get() is not None and torch.is_grad_enabled()


def is_on_tape(tensor: torch.Tensor) -> bool:
    """Whether the tensor is kept as a recipe here and now, so that what is made of it can be, too, without
    keeping more.
    """
    tape = _tape.get()
    return tape is not None and torch.is_grad_enabled() and tape.knows(tensor)


@contextmanager
def recording() -> Iterator[None]:
    """While open, what `recompute_later` gives is kept as its recipe; the rest as under the `saving` around
    it.
    """
    tape = RecomputeTape(*_hooks.get())
    token = _tape.set(tape)
    try:
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, lambda packed: _unpack(packed, tape.fetch)):
            yield
    finally:
        _tape.reset(token)
        tape.close()


@contextmanager
def saving(pack: Pack, unpack: Unpack) -> Iterator[None]:
    """torch's hooks for tensors that are kept, which a `recording` inside uses for all that has no recipe."""
    token = _hooks.set((pack, unpack))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _hooks.reset(token)


class RecomputeTape:
    """The recipes of a forward pass, by the storage of what they gave."""

    def __init__(self, pack: Pack, unpack: Unpack):
        self.keep, self.fetch = pack, unpack
        self._calls: dict[int, tuple[_RecordedCall, torch.Tensor, int]] = {}

    def enter(self, output: torch.Tensor, call: _RecordedCall, inputs: Sequence[torch.Tensor]) -> None:
        if _storage(output) not in map(_storage, inputs):  # else it takes no memory of its own
            # held: no other storage gets this address meanwhile
            self._calls[_storage(output)] = (call, output.detach(), output._version)

    def pack(self, tensor: torch.Tensor) -> Any:
        """The recipe and which part of its output the tensor is, or whatever keeps it."""
        call, output, version = self._calls.get(_storage(tensor), (None, tensor, 0))
        # changed in place: what the recipe gives is another
        if call is None or output._version != version or tensor.dtype != output.dtype:
            return self.keep(tensor)
        return _OutputView(call, tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._calls

    def close(self) -> None:
        self._calls.clear()


class _OutputView:
    """A view of what a recipe gives."""

    def __init__(self, call: _RecordedCall, tensor: torch.Tensor):
        self._recipe, self._view = call, (tensor.size(), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> torch.Tensor:
        return self._recipe.output().as_strided(*self._view)


def _unpack(packed: Any, fetch: Unpack) -> torch.Tensor:
    return packed.tensor() if isinstance(packed, _OutputView) else fetch(packed)


class _RecordedCall:
    """A function and its inputs, each kept as the book keeps it, which may be as a recipe, too."""

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        parameters: Sequence[torch.Tensor],
        tape: RecomputeTape,
    ):
        self._function, self._parameters, self._fetch = function, parameters, tape.fetch
        self._inputs = [
            (tape.pack(tensor.detach()), tensor.requires_grad, tensor._version) for tensor in inputs
        ]
        self._autocast = _autocast_of(inputs[0].device)
        self._made: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def output(self) -> torch.Tensor:
        """What the function gives, kept from here until `gradients`, if those will be asked for."""
        has_gradients = any(needs for _, needs, _ in self._inputs) or any(
            parameter.requires_grad for parameter in self._parameters
        )
        made = self._made or self._make()
        if has_gradients:
            self._made = made
        return made[1].detach()

    def gradients(self, grad: torch.Tensor) -> list[torch.Tensor | None]:
        """Of the inputs, then of the parameters; None where none is needed."""
        leaves, output = self._made or self._make()
        self._made = None
        sources = [*leaves, *self._parameters]
        found = iter(
            torch.autograd.grad(output, [source for source in sources if source.requires_grad], grad)
        )
        return [next(found) if source.requires_grad else None for source in sources]

    def _make(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = []
        for packed, needs, version in self._inputs:
            tensor = _unpack(packed, self._fetch)
            if isinstance(packed, torch.Tensor) and packed._version != version:
                raise RuntimeError("a tensor of which another is to be made again was changed in place")
            leaves.append(tensor.detach().requires_grad_(needs))
        with torch.enable_grad(), self._autocast():
            return leaves, self._function(*leaves)


class _RecomputeLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _RecordedCall, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        return call._function(*inputs[: len(call._inputs)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, ctx.call = ctx.call, None  # its inputs go once nobody else needs them
        if call is None:
            raise RuntimeError("what was kept as a recipe has one backward pass")
        return None, *call.gradients(grads[0])


def _autocast_of(device: torch.device) -> Callable[[], Any]:
    """What brings back the autocast that is on now."""
    dtype = autocast_dtype(device)
    return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype, cache_enabled=False)


def _storage(tensor: torch.Tensor) -> int:
    """Tells storages apart, fake ones, too."""
    return tensor.untyped_storage()._cdata
