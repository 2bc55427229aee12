"""Activations of decoder layers in host memory between the forward and the backward pass.

Each layer's saved activations are copied to pinned host memory while the next layer is computed, and fetched
back during the backward pass of the layer above. Weights, tensors that layers share (masks, rotary tables)
and small tensors stay on the device. A storage that several operators have saved is moved once, and its
tensors get their strides back, so that the gradients are the same to the bit.

Under recomputation `full` a layer saves only its input. Under `selective` the kept matrix products stay on
the device (`selective.py`); only the input is moved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from dpo_cache.lm.memory.recompute import decoder_layers
from dpo_cache.lm.memory.recompute_later import saving
from dpo_cache.lm.patches import Patches
from dpo_cache.log import Log

MIN_BYTES = 2**16  # smallest storage that is worth a copy


def offload_activations(
    model: PreTrainedModel, log: Log, transfer: CudaTransfer | None = None, patches: Patches | None = None
) -> int:
    """Let the model's decoder layers keep their activations in host memory; returns the number of these
    layers.

    Call it after `Recomputation` has wrapped them. On a CPU or MPS there is only host memory: it logs that
    nothing changes.
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
    """Copies of flat uint8 tensors on two streams, one for each direction, at the same time as the
    computation.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, content: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Start to copy a tensor to the host; returns the argument of `to_device`."""
        host = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            host.copy_(content, non_blocking=True)
            done = self._out.record_event()
        content.record_stream(self._out)  # its memory is not reused before the copy has ended
        return host, done

    def to_device(
        self, content: tuple[torch.Tensor, torch.cuda.Event]
    ) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Start to fetch it; returns the argument of `wait`."""
        host, done = content
        with torch.cuda.stream(self._back):
            self._back.wait_event(done)
            fetched = host.to(self._device, non_blocking=True)
            return fetched, self._back.record_event()

    def wait(self, arriving: tuple[torch.Tensor, torch.cuda.Event]) -> torch.Tensor:
        """The tensor on the device; the current stream waits for the copy."""
        fetched, done = arriving
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(done)
        fetched.record_stream(stream)
        return fetched


class _Offload:
    """Remembers the layer that ran before, whose activations the backward pass needs next."""

    def __init__(self, transfer: CudaTransfer):
        self._transfer = transfer
        self._latest: Callable[[], _SavedTensors | None] = lambda: None

    def run(self, layer: torch.nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        masks = getattr(kwargs.get("forest_plan"), "masks", {})
        given = [*layer.parameters(), *layer.buffers(), *_tensors(kwargs)]
        saved = _SavedTensors(self._transfer, self._latest, given, masks)
        with saving(saved.pack, saved.unpack):
            output = forward(*args, **kwargs)
        saved.end_forward()
        self._latest = weakref.ref(saved)
        return output


class _SavedTensors:
    """The tensors that one run of a layer has saved, by storage: on the host, and on the device from their
    first use until the backward pass of the layer has ended.

    `given` and `masks` stay on the device: the layer's weights and buffers, and what all layers share. The
    masks are passed apart because a plan builds them when a layer first needs them.
    """

    def __init__(
        self,
        transfer: CudaTransfer,
        previous: Callable[[], _SavedTensors | None],
        given: Iterable[torch.Tensor],
        masks: dict[Any, Any],
    ):
        self._transfer, self._previous = transfer, previous
        self._staying, self._masks = {_pointer(tensor) for tensor in given}, masks
        # By address and version: a tensor that was changed has other content. The sources are held while the
        # layer runs, so that no other storage gets their address.
        self._sources: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
        self._on_host: list[Any] = []
        self._arriving: list[Any] = []

    def pack(self, tensor: torch.Tensor) -> Any:
        """The tensor itself if it stays, or which part of which storage it is."""
        is_plain = tensor.layout == torch.strided and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or tensor.untyped_storage().nbytes() < MIN_BYTES or self._stays(tensor):
            return tensor
        known = (_pointer(tensor), tensor._version)
        if known not in self._sources:
            content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._sources[known] = len(self._on_host), content
            self._on_host.append(self._transfer.to_host(content))
        index, _ = self._sources[known]
        return index, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        index, dtype, *view = packed
        self.fetch()
        if (previous := self._previous()) is not None:
            previous.fetch()
        content = self._transfer.wait(self._arriving[index])
        return torch.empty(0, dtype=dtype, device=content.device).set_(content.untyped_storage(), *view)

    def fetch(self) -> None:
        """Start to fetch all of it, if that has not started."""
        if not self._arriving:
            self._arriving = [self._transfer.to_device(content) for content in self._on_host]

    def end_forward(self) -> None:
        """The layer has run: release the tensors that were copied to the host."""
        self._sources.clear()

    def _stays(self, tensor: torch.Tensor) -> bool:
        pointer = _pointer(tensor)
        return pointer in self._staying or pointer in map(_pointer, _tensors(self._masks))


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: dict[Any, Any]) -> Iterable[torch.Tensor]:
    return filter(torch.is_tensor, tree_leaves(values))
