"""Where the states of passes are kept between two layers: on the device, or on the host.

`put` returns a ticket, with which `get` returns the tensor any number of times.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from dpo_cache.lm.memory.offload import CudaTransfer


class States(Protocol):
    """A store of tensors."""

    def put(self, state: torch.Tensor) -> Any:
        """Keep the tensor; returns its ticket for `get`."""
        ...

    def expect(self, ticket: Any) -> None:
        """Start to fetch the tensor that the next `get` will take."""
        ...

    def get(self, ticket: Any) -> torch.Tensor:
        """The tensor, on the device."""
        ...


class DeviceStates:
    """Keeps tensors where they are."""

    def put(self, state: torch.Tensor) -> torch.Tensor:
        return state

    def expect(self, _: torch.Tensor) -> None:
        pass

    def get(self, ticket: torch.Tensor) -> torch.Tensor:
        return ticket


class HostStates:
    """Keeps tensors in pinned memory of the host; copies run at the same time as the computation."""

    def __init__(self, transfer: CudaTransfer):
        self._transfer = transfer
        self._arriving: tuple[Any, Any] | None = None  # a ticket, and the argument of the transfer's `wait`

    def put(self, state: torch.Tensor) -> Any:
        return self._transfer.to_host(state.contiguous())

    def expect(self, ticket: Any) -> None:
        self._arriving = ticket, self._transfer.to_device(ticket)

    def get(self, ticket: Any) -> torch.Tensor:
        arriving, self._arriving = self._arriving, None
        if arriving is None or arriving[0] is not ticket:
            return self._transfer.wait(self._transfer.to_device(ticket))
        return self._transfer.wait(arriving[1])


class PlainHostStates:
    """The same without copies that overlap, for devices that have no streams here (MPS)."""

    def __init__(self, device: torch.device):
        self._device = device

    def put(self, state: torch.Tensor) -> torch.Tensor:
        return state.to("cpu")

    def expect(self, _: torch.Tensor) -> None:
        pass

    def get(self, ticket: torch.Tensor) -> torch.Tensor:
        return ticket.to(self._device)


def states_on(place: str, device: torch.device) -> States:
    """The store for `inputs` device or host of a `Placement`; a CPU has only its own memory."""
    if place == "device" or device.type == "cpu":
        return DeviceStates()
    return HostStates(CudaTransfer(device)) if device.type == "cuda" else PlainHostStates(device)
