"""Bytes on their way from the host to the device: two slots of a ring, one in use while the other is filled.

    ring = Ring(transfer)
    ring.fetch("layer 0", num_bytes, fill)    `fill` writes the bytes into a buffer of the host
    flat = ring.open("layer 0")               waits for them: uint8 [num_bytes] on the device
    ring.fetch("layer 1", num_bytes, fill)    arrives while layer 0 is computed
    ring.close("layer 0")

Buffers are made once and used again: memory that is new to a process costs page faults, and pinned memory a
call to the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

NUM_SLOTS = 2

Fill = Callable[[torch.Tensor], None]  # writes all of a flat uint8 tensor on the host
Wait = Callable[[], None]


class Transfer(Protocol):
    """Moves bytes to the device."""

    device: torch.device

    def send(self, slot: int, target: torch.Tensor, fill: Fill) -> Wait:
        """Start to bring what `fill` writes to a flat uint8 tensor on the device.

        It is written once the device has done what it was given to do until now. What it is given to do after
        the returned function has been called sees the bytes; that function raises `fill`'s error. `slot` is
        the buffer of the host that they pass through.
        """
        ...

    def close(self) -> None:
        """Wait for what is on its way."""
        ...


class Ring:
    """Two flat tensors on the device, and what each of them holds."""

    def __init__(self, transfer: Transfer):
        self._transfer = transfer
        self._slots = [torch.empty(0, dtype=torch.uint8, device=transfer.device) for _ in range(NUM_SLOTS)]
        self._content: list[Hashable] = [None] * NUM_SLOTS  # from the moment its fetch starts
        self._sizes = [0] * NUM_SLOTS
        self._waits: list[Wait] = [lambda: None] * NUM_SLOTS
        self._is_open = [False] * NUM_SLOTS
        self._latest = 0  # the slot that was opened last
        self.slot_bytes = 0  # the size of the slots from the next fetch on; larger ones grow
        self.num_fetches = 0
        self.num_bytes = 0  # fetched so far

    def fetch(self, key: Hashable, num_bytes: int, fill: Fill) -> None:
        """Start to fetch it, unless it is there or on its way."""
        if key in self._content:
            return
        free = [slot for slot in range(NUM_SLOTS) if not self._is_open[slot]]
        assert free, "a layer is fetched while two others are in use"
        slot = next((one for one in free if one != self._latest), free[0])
        if self._slots[slot].numel() < num_bytes:
            self._waits[slot]()
            size = max(num_bytes, self.slot_bytes)
            self._slots[slot] = torch.empty(size, dtype=torch.uint8, device=self._transfer.device)
        self._content[slot], self._sizes[slot] = key, num_bytes
        self._waits[slot] = self._transfer.send(slot, self._slots[slot][:num_bytes], fill)
        self.num_fetches += 1
        self.num_bytes += num_bytes

    def open(self, key: Hashable) -> torch.Tensor:
        """Its bytes on the device, which stay until `close`."""
        slot = self._content.index(key)
        try:
            self._waits[slot]()
        except BaseException:
            self._content[slot], self._waits[slot] = None, lambda: None
            raise
        self._is_open[slot], self._latest = True, slot
        return self._slots[slot][: self._sizes[slot]]

    def close(self, key: Hashable) -> None:
        """Undo `open`; the content is still there for a later one, unless another one took its slot."""
        self._is_open[self._content.index(key)] = False

    def forget(self, key: Hashable) -> None:
        """Its home has changed: fetch it again for the next `open`."""
        if key in self._content:
            slot = self._content.index(key)
            assert not self._is_open[slot], "weights change while they are in use"
            self._content[slot] = None

    def free(self) -> None:
        """Give the memory back."""
        self.__init__(self._transfer)  # type: ignore[misc]


class Shelf(Ring):
    """The same with a flat tensor for each content, which stays: it is fetched again only when its home has
    changed.
    """

    def __init__(self, transfer: Transfer):
        super().__init__(transfer)
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._fresh: dict[Hashable, Wait] = {}

    def fetch(self, key: Hashable, num_bytes: int, fill: Fill) -> None:
        if key in self._fresh:
            return
        if key not in self._kept or self._kept[key].numel() != num_bytes:
            self._kept[key] = torch.empty(num_bytes, dtype=torch.uint8, device=self._transfer.device)
        slot = self.num_fetches % NUM_SLOTS
        self._fresh[key] = self._transfer.send(slot, self._kept[key], fill)
        self.num_fetches += 1
        self.num_bytes += num_bytes

    def open(self, key: Hashable) -> torch.Tensor:
        try:
            self._fresh[key]()
        except BaseException:
            del self._fresh[key]
            raise
        return self._kept[key]

    def close(self, key: Hashable) -> None:
        pass

    def forget(self, key: Hashable) -> None:
        self._fresh.pop(key, None)


class PlainTransfer:
    """Copies that nothing overlaps: for MPS, and for tensors that only have shapes."""

    def __init__(self, device: torch.device):
        self.device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def send(self, slot: int, target: torch.Tensor, fill: Fill) -> Wait:  # noqa: ARG002
        if self._buffer.numel() < target.numel():
            self._buffer = torch.empty(target.numel(), dtype=torch.uint8)
        content = self._buffer[: target.numel()]
        fill(content)
        target.copy_(content)
        return lambda: None

    def close(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)


class ThreadTransfer:
    """For a CPU: a thread reads from the disk, or casts, right to the target."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._thread = ThreadPoolExecutor(1, "layer-weights")

    def send(self, slot: int, target: torch.Tensor, fill: Fill) -> Wait:  # noqa: ARG002
        return self._thread.submit(fill, target).result

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class CudaTransfer:
    """A thread fills pinned buffers, one for each slot, from which a stream of its own copies.

    A pinned buffer is filled again once the copy from it has ended.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "layer-weights")
        self._pinned: list[torch.Tensor | None] = [None] * NUM_SLOTS
        self._sent: list[Any] = [None] * NUM_SLOTS  # events: the copy from the buffer has ended

    def send(self, slot: int, target: torch.Tensor, fill: Fill) -> Wait:
        read = torch.cuda.current_stream(self.device).record_event()
        target.record_stream(self._stream)  # its memory is not another tensor's before the copy has ended
        arriving = self._thread.submit(self._send, slot, target, fill, read)

        def wait() -> None:
            torch.cuda.current_stream(self.device).wait_event(arriving.result())

        return wait

    def _send(self, slot: int, target: torch.Tensor, fill: Fill, read: Any) -> Any:
        if self._sent[slot] is not None:
            self._sent[slot].synchronize()
        pinned = self._pinned[slot]
        if pinned is None or pinned.numel() < target.numel():
            self._pinned[slot] = pinned = torch.empty(target.numel(), dtype=torch.uint8, pin_memory=True)
        content = pinned[: target.numel()]
        fill(content)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(read)
            target.copy_(content, non_blocking=True)
            self._sent[slot] = self._stream.record_event()
        return self._sent[slot]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._stream.synchronize()
        self._pinned = [None] * NUM_SLOTS


def transfer_to(device: torch.device) -> Transfer:
    """The transfer for a device of this type."""
    if device.type == "cuda":
        return CudaTransfer(device)
    return ThreadTransfer() if device.type == "cpu" else PlainTransfer(device)
