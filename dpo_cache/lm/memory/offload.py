"""Activations of decoder layers in host memory between the forward and the backward pass.

Each layer's saved activations are copied to pinned host memory beside the computation of the next layer, and
fetched back beside the backward pass of the layer above. Weights, what layers share (masks, rotary tables)
and small tensors stay. A storage that several operators have saved is moved once, and comes back with the
same strides, so that the gradients are the same to the bit.

Under recomputation `full` what a layer saves is its input. Under `selective` the matrix products that are
kept lie in torch's own store, which stays on the device; only the input is moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.lm.memory.recompute_later import saving
from dpo_cache.lm.patches import Patches
from dpo_cache.log import Log

LEAST_BYTES = 2**16  # of a storage that is worth a copy


class Transfer(Protocol):
    """Moves bytes between the device and the host."""

    def to_host(self, content: torch.Tensor) -> Any:
        """Begin to copy a flat uint8 tensor to the host; what `to_device` takes."""

    def to_device(self, content: Any) -> Any:
        """Begin to fetch it; what `wait` takes."""

    def wait(self, arriving: Any) -> torch.Tensor:
        """The flat uint8 tensor on the device, ready to be read by what is computed next."""


def offload_activations(
    model: PreTrainedModel, log: Log, transfer: Transfer | None = None, patches: Patches | None = None
) -> int:
    """Let the model's decoder layers keep their activations in host memory; returns the number of layers that
    do.

    Call it after `Recomputation` has wrapped them. On a CPU or MPS there is only host memory: a remark says
    that nothing changes.
    """
    if transfer is None and model.device.type != "cuda":
        log(
            f"`offload_activations` has no effect on {model.device.type}, whose activations are in host "
            "memory already."
        )
        return 0
    layers = decoder_layers(model)
    if not layers:
        log(f"`offload_activations` has no effect: {type(model).__name__} has no layers that take it.")
        return 0
    offload = _Offload(transfer or CudaTransfer(model.device))
    patches = patches or Patches()
    for layer in layers:
        patches.wrap(layer, offload.run)
    return len(layers)


class CudaTransfer:
    """Copies on streams of their own, one a direction, so that they pass beside the computation and each
    other.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, content: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        host = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            host.copy_(content, non_blocking=True)
            done = self._out.record_event()
        content.record_stream(self._out)  # its memory is not given away before the copy has ended
        return host, done

    def to_device(
        self, content: tuple[torch.Tensor, torch.cuda.Event]
    ) -> tuple[torch.Tensor, torch.cuda.Event]:
        host, done = content
        with torch.cuda.stream(self._back):
            self._back.wait_event(done)
            fetched = host.to(self._device, non_blocking=True)
            return fetched, self._back.record_event()

    def wait(self, arriving: tuple[torch.Tensor, torch.cuda.Event]) -> torch.Tensor:
        fetched, done = arriving
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        fetched.record_stream(stream)
        return fetched


class _Offload:
    """Knows the layer that was run before, which is the one whose activations are needed next in the backward
    pass.
    """

    def __init__(self, transfer: Transfer):
        self._transfer = transfer
        self._latest: weakref.ref[_Moved] | None = None

    def run(self, layer: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        moved = _Moved(self._transfer, self._latest, _Staying(layer, kwargs))
        with saving(moved.pack, moved.unpack):
            output = forward(*args, **kwargs)
        moved.end_forward()
        self._latest = weakref.ref(moved)
        return output


class _Staying:
    """The storages that a layer does not own alone: its weights and buffers, and what the layers are all
    given.
    """

    def __init__(self, layer: torch.nn.Module, kwargs: dict[str, Any]):
        given = [tensor for value in kwargs.values() for tensor in _tensors(value)]
        self._pointers = {_pointer(tensor) for tensor in (*layer.parameters(), *layer.buffers(), *given)}
        # the first layer to need one adds it
        self._masks: dict[Any, Any] = getattr(kwargs.get("forest_plan"), "masks", {})

    def __contains__(self, tensor: torch.Tensor) -> bool:
        pointer = _pointer(tensor)
        return pointer in self._pointers or any(pointer == _pointer(mask) for mask in _tensors(self._masks))


class _Moved:
    """What one run of a layer has saved, by storage: on the host, and on the device from the first use to the
    next layer's.
    """

    def __init__(self, transfer: Transfer, previous: weakref.ref[_Moved] | None, staying: _Staying):
        self._transfer, self._previous, self._staying = transfer, previous, staying
        self._place_of: dict[
            tuple[int, int], int
        ] = {}  # by address and version: what was changed since is another content
        self._sources: list[
            torch.Tensor
        ] = []  # held while the layer runs, so that no other storage gets an address that is known
        self._on_host: list[Any] = []
        self._arriving: list[Any] = []

    def pack(self, tensor: torch.Tensor) -> Any:
        """The tensor itself where it stays, or where in which storage it lies."""
        is_plain = tensor.layout == torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or tensor.untyped_storage().nbytes() < LEAST_BYTES or tensor in self._staying:
            return tensor
        known = (_pointer(tensor), tensor._version)
        if known not in self._place_of:
            content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._place_of[known] = len(self._on_host)
            self._on_host.append(self._transfer.to_host(content))
            self._sources.append(content)
        return self._place_of[known], tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        place, dtype, offset, size, stride = packed
        if not self._arriving:
            self.fetch()
        previous = self._previous() if self._previous else None
        if previous is not None:
            previous.fetch()
        content = self._transfer.wait(self._arriving[place])
        return torch.empty(0, dtype=dtype, device=content.device).set_(
            content.untyped_storage(), offset, size, stride
        )

    def fetch(self) -> None:
        """Begin to fetch all of it, if that has not begun."""
        if not self._arriving:
            self._arriving = [self._transfer.to_device(content) for content in self._on_host]

    def end_forward(self) -> None:
        """The layer has run: what is on its way to the host may go."""
        self._sources, self._place_of = [], {}


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value of tensors, tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
