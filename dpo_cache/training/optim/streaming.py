"""Slices of host tensors that pass through a device: copied there, changed, and copied back.

All tensors of a slice are packed into one pinned buffer, which is copied to a device buffer of the same
layout. Two such pairs of buffers take turns: while one slice is on its way or computed, the host packs the
next one. On CUDA, the host waits for the device only before it reuses a buffer, two slices later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

NUM_PAIRS = 2
ALIGNMENT = 256  # bytes: alignment of each tensor in a buffer

Pieces = dict[str, torch.Tensor]  # flat and contiguous


class Transfer(Protocol):
    """Copies between host and device, in parallel with the computation where the device can do that."""

    def buffers(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New uint8 buffers of one size, on the host and on the device."""
        ...

    def start_up(self, device: torch.Tensor, host: torch.Tensor) -> Any:
        """Start to copy to the device; returns the argument of `arrive`."""
        ...

    def arrive(self, copy: Any) -> None:
        """Make later work on the device wait for that copy."""
        ...

    def start_down(self, host: torch.Tensor, device: torch.Tensor) -> Any:
        """Start to copy results of the device to the host; returns the argument of `wait`."""
        ...

    def wait(self, copy: Any) -> None:
        """Return when that copy has ended."""
        ...


class CudaTransfer:
    """Copies on two streams, one for each direction."""

    def __init__(self, device: torch.device):
        self._device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffers(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._up.wait_stream(torch.cuda.current_stream(self._device))  # it may have used the memory
        for stream in (self._up, self._down):
            device.record_stream(stream)
        return host, device

    def start_up(self, device: torch.Tensor, host: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._up):
            device.copy_(host, non_blocking=True)
            return self._up.record_event()

    def arrive(self, copy: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copy)

    def start_down(self, host: torch.Tensor, device: torch.Tensor) -> torch.cuda.Event:
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            host.copy_(device, non_blocking=True)
            return self._down.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        copy.synchronize()


class PlainTransfer:
    """Copies that have ended when they return: for devices other than CUDA."""

    def __init__(self, device: torch.device):
        self._device = device

    def buffers(self, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.empty(num_bytes, dtype=torch.uint8),
            torch.empty(num_bytes, dtype=torch.uint8, device=self._device),
        )

    def start_up(self, device: torch.Tensor, host: torch.Tensor) -> None:
        device.copy_(host)

    def arrive(self, copy: None) -> None:
        pass

    def start_down(self, host: torch.Tensor, device: torch.Tensor) -> None:
        host.copy_(device)

    def wait(self, copy: None) -> None:
        pass


def transfer_to(device: torch.device) -> Transfer:
    """The transfer for a device."""
    return CudaTransfer(device) if device.type == "cuda" else PlainTransfer(device)


@dataclass
class _Pair:
    """Two buffers, and the slice in them that is on its way back: its copy, its tensors, and their places."""

    host: torch.Tensor | None = None
    device: torch.Tensor | None = None
    copy: Any = None
    homes: list[tuple[torch.Tensor, int]] = field(default_factory=list)


class SliceStream:
    """Lets slices pass through the device, in order; `finish` ends the last ones.

    Until then, other code must not change the tensors of a slice.
    """

    def __init__(self, transfer: Transfer):
        self._transfer = transfer
        self._pairs = [_Pair() for _ in range(NUM_PAIRS)]
        self._turn = 0

    def run(
        self, pieces: Pieces, change: Callable[[Pieces], None], *, unchanged: Collection[str] = ()
    ) -> None:
        """Call `change` with the tensors of a slice on the device. It changes all of them but the
        `unchanged`.
        """
        pair = self._pairs[self._turn]
        self._turn = (self._turn + 1) % NUM_PAIRS
        self._return(pair)
        ordered = {name: pieces[name] for name in sorted(pieces, key=lambda name: name in unchanged)}
        places, num_bytes = _places(ordered)
        host, device = self._buffers(pair, num_bytes)
        for name, piece in ordered.items():
            _part(host, places[name], piece).copy_(piece)
        self._transfer.arrive(self._transfer.start_up(device[:num_bytes], host[:num_bytes]))
        change({name: _part(device, places[name], piece) for name, piece in ordered.items()})
        pair.homes = [(piece, places[name]) for name, piece in ordered.items() if name not in unchanged]
        changed_bytes = max((place + piece.nbytes for piece, place in pair.homes), default=0)
        pair.copy = self._transfer.start_down(host[:changed_bytes], device[:changed_bytes])

    def finish(self) -> None:
        """Return when every slice is back in its tensors."""
        for place in range(NUM_PAIRS):
            self._return(self._pairs[(self._turn + place) % NUM_PAIRS])

    def _return(self, pair: _Pair) -> None:
        if not pair.homes:
            return
        assert pair.host is not None
        self._transfer.wait(pair.copy)
        for piece, place in pair.homes:
            piece.copy_(_part(pair.host, place, piece))
        pair.homes = []

    def _buffers(self, pair: _Pair, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        if pair.host is None or pair.device is None or pair.host.numel() < num_bytes:
            pair.host = pair.device = None  # freed before new ones are made
            pair.host, pair.device = self._transfer.buffers(num_bytes)
        return pair.host, pair.device


def _places(pieces: Mapping[str, torch.Tensor]) -> tuple[dict[str, int], int]:
    """The offset of each tensor in a buffer, and the buffer's size, in bytes."""
    places, end = {}, 0
    for name, piece in pieces.items():
        places[name] = end
        end += -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


def _part(buffer: torch.Tensor, place: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[place : place + like.nbytes].view(like.dtype)
