"""Tensors that the backward pass computes again, from others that are kept anyway, where that costs next to
nothing.

The output of a norm or an activation function, or a copy of keys, takes as much memory as a matrix product's
and a hundredth of its time. Within `recording`, the output of `recompute_later` is kept as its call, a
function and its inputs, by every operation that saves it for its backward pass, such as the product that
multiplies it. The first of them to run backward repeats the call, and the gradient of the output passes
through the repeated call. The operations are the same as if everything were kept, and so are the gradients;
a tensor that is also used in other ways has its gradients added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from dpo_cache.lm.device import autocast_dtype

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]

_tape: ContextVar[RecomputeTape | None] = ContextVar("tape", default=None)
_hooks: ContextVar[tuple[Pack, Unpack]] = ContextVar(
    "hooks", default=(lambda tensor: tensor, lambda tensor: tensor)
)


def recompute_later(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, parameters: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """`function(*inputs)`, which may also use `parameters`; within `recording` it is kept as this call.

    The function must return one tensor, the same for the same inputs.
    """
    tape = _open_tape()
    if tape is None:
        return function(*inputs)
    call = _RecordedCall(function, inputs, parameters, tape)
    output = _RecomputeLater.apply(call, *inputs, *parameters)
    if _storage(output) not in map(_storage, inputs):  # else it takes no memory of its own
        # the output is held, so that no other storage gets its address meanwhile
        tape.calls[_storage(output)] = (call, output.detach(), output._version)
    return output


def is_recording() -> bool:
    """Return whether `recompute_later` keeps calls at present."""
    return _open_tape() is not None


def is_on_tape(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is kept as a call at present, so that a tensor made of it can be, too,
    without keeping more.
    """
    tape = _open_tape()
    return tape is not None and _storage(tensor) in tape.calls


@contextmanager
def recording() -> Iterator[None]:
    """While open, outputs of `recompute_later` are kept as calls; other tensors as the `saving` around it
    keeps them.
    """
    tape = RecomputeTape(*_hooks.get())
    token = _tape.set(tape)
    try:
        with torch.autograd.graph.saved_tensors_hooks(tape.pack, lambda packed: _unpack(packed, tape.fetch)):
            yield
    finally:
        _tape.reset(token)
        tape.calls.clear()


@contextmanager
def saving(pack: Pack, unpack: Unpack) -> Iterator[None]:
    """torch's hooks for saved tensors, which a `recording` inside also uses, for tensors that it did not
    record.
    """
    token = _hooks.set((pack, unpack))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _hooks.reset(token)


class RecomputeTape:
    """The calls of a forward pass, by the storage of their outputs."""

    def __init__(self, pack: Pack, unpack: Unpack):
        self.keep, self.fetch = pack, unpack
        self.calls: dict[int, tuple[_RecordedCall, torch.Tensor, int]] = {}

    def pack(self, tensor: torch.Tensor) -> Any:
        """The call with the tensor's view of its output, or whatever `keep` returns."""
        call, output, version = self.calls.get(_storage(tensor), (None, tensor, 0))
        # after a change in place, the call no longer returns the tensor
        if call is None or output._version != version or tensor.dtype != output.dtype:
            return self.keep(tensor)
        return partial(call.view, tensor.size(), tensor.stride(), tensor.storage_offset())


def _open_tape() -> RecomputeTape | None:
    return _tape.get() if torch.is_grad_enabled() else None


def _unpack(packed: Any, fetch: Unpack) -> torch.Tensor:
    return packed() if isinstance(packed, partial) else fetch(packed)


class _RecordedCall:
    """A function and its inputs, which the tape keeps, perhaps as calls, too."""

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
        device = inputs[0].device
        dtype = autocast_dtype(device)
        # brings back the autocast that is on now
        autocast_now = partial(torch.autocast, device.type, dtype, cache_enabled=False)
        self._autocast: Callable[[], Any] = nullcontext if dtype is None else autocast_now
        self._made: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def view(self, *size_stride_offset: Any) -> torch.Tensor:
        """A view of the output, which is kept from the first one until `gradients`, if there will be any."""
        leaves, output = made = self._made or self._make()
        if any(source.requires_grad for source in (*leaves, *self._parameters)):
            self._made = made
        return output.detach().as_strided(*size_stride_offset)

    def gradients(self, grad: torch.Tensor) -> list[torch.Tensor | None]:
        """Gradients of the inputs, then of the parameters; None where none is needed."""
        leaves, output = self._made or self._make()
        self._made = None
        sources = [*leaves, *self._parameters]
        needed = [source for source in sources if source.requires_grad]
        found = iter(torch.autograd.grad(output, needed, grad))
        return [next(found) if source.requires_grad else None for source in sources]

    def _make(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaves = []
        for packed, needs, version in self._inputs:
            tensor = _unpack(packed, self._fetch)
            if isinstance(packed, torch.Tensor) and packed._version != version:
                raise RuntimeError("an input of a tensor that is computed again was changed in place")
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
        call, ctx.call = ctx.call, None  # its inputs are freed once nothing else needs them
        if call is None:
            raise RuntimeError("a tensor that is computed again has one backward pass")
        return None, *call.gradients(grads[0])


def _storage(tensor: torch.Tensor) -> int:
    """Identifies a storage, also a fake one."""
    return tensor.untyped_storage()._cdata
