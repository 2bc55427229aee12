"""The device memory of a layer-major step besides its weights, counted on fake tensors.

The passes are the package's own (`lm/layerwise`). States and gradients that are moved to the host are dropped
here, but two states still count: the one that is being moved, and the one that is fetched ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from dpo_cache.lm.device import simulate_device_type
from dpo_cache.lm.layerwise.passes import BOTTOM
from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import Layers, find_layers
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.policy import PolicyModel, decoder_pass
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.planning.few_layers import num_layers, with_layers
from dpo_cache.planning.footprint import build_fake, counted_attention, policy_of
from dpo_cache.planning.live_bytes import LiveBytes
from dpo_cache.planning.parts import Method
from dpo_cache.types import Completion

COUNTED_FORESTS = 2  # the first makes each gradient, the second adds to it
COUNTED_LAYERS = 2


@dataclass(frozen=True)
class PhasePeaks:
    """Peak bytes above the weights, with the gradients of the running part, if all other tensors are on the
    host.
    """

    forward: int  # the bottom, and all layers
    top: int  # norm, head and losses, with the head's gradient
    backward: int  # the layers' backward pass, with the gradients of one layer
    bottom: int  # the embeddings' backward pass, with their gradient
    state: int  # the largest forest's hidden states between two layers


def phase_peaks(
    config: PreTrainedConfig,
    method: Method,
    forests: Sequence[Sequence[Completion]],
    *,
    alike: bool,
    recomputation: str = "cheap",
    device_type: str = "cuda",
) -> PhasePeaks:
    """The peaks of a step over these forests, largest first.

    `recomputation` applies within a layer that is run again for its gradient. `alike`: all layers hold the
    same tensors, so a few are enough.
    """
    if alike and num_layers(config) > COUNTED_LAYERS:
        config = with_layers(config, COUNTED_LAYERS)
    found, waiting = _peaks(config, method, forests[:COUNTED_FORESTS], recomputation, device_type)
    more = round(waiting / COUNTED_FORESTS) * max(0, len(forests) - COUNTED_FORESTS)
    return PhasePeaks(
        found.forward + more, found.top + more, found.backward + more, found.bottom + more, found.state
    )


def _peaks(
    config: PreTrainedConfig,
    method: Method,
    forests: Sequence[Sequence[Completion]],
    recomputation: str,
    device_type: str,
) -> tuple[PhasePeaks, int]:
    """The peaks of these forests, and the bytes that stay on the device between two layers: the layers'
    inputs.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), simulate_device_type(device_type):
        model = build_fake(config, method.dtype, lora_r=method.lora_r, lora_targets=method.lora_targets)
        model = policy_of(model, recomputation)
        attention = counted_attention(model, method.precision)
        layers, states = _layers_of(model, forests[-1], attention), _WaitingStates()
        policy = PolicyModel(model, attention, precision=method.precision)
        run = LayerMajorRun(policy, layers, ResidentWeights(), states)
        peaks: list[int] = []  # the layers' backward pass, then the bottom's
        with LiveBytes() as live:

            def leave(index: int) -> None:
                """Drop the existing gradients, which leave the device."""
                for parameter in model.parameters():
                    parameter.grad = None
                if index in (0, BOTTOM):
                    peaks.append(live.take_peak())

            run.forward(forests)
            forward, waiting = live.take_peak(), live.now - states.leaving_bytes
            for place in range(len(forests)):
                run.logps(place).sums().sum().backward()
                run.end_top(place)
            top = live.take_peak()
            model.zero_grad(set_to_none=True)
            live.take_peak()
            run.backward(leave)
    return PhasePeaks(forward, top, peaks[0], peaks[-1], states.largest), waiting


@torch.no_grad()
def _layers_of(
    model: PreTrainedModel, completions: Sequence[Completion], attention: AttentionChoice
) -> Layers:
    return find_layers(model, **decoder_pass(model, completions, attention).arguments)


@dataclass(frozen=True)
class _Ticket:
    """A state that was moved to the host."""

    shape: torch.Size
    dtype: torch.dtype

    def fetch(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


class _WaitingStates:
    """Stands in for `HostStates` and keeps on the device what it does: a leaving state, and one fetched
    ahead.
    """

    def __init__(self) -> None:
        self.largest = 0
        self._leaving: torch.Tensor | None = None
        self._arriving: tuple[_Ticket, torch.Tensor] | None = None

    @property
    def leaving_bytes(self) -> int:
        return 0 if self._leaving is None else self._leaving.nbytes

    def put(self, state: torch.Tensor) -> Any:
        self.largest = max(self.largest, state.nbytes)
        self._leaving = state
        return _Ticket(state.shape, state.dtype)

    def expect(self, ticket: _Ticket) -> None:
        self._arriving = ticket, ticket.fetch()

    def get(self, ticket: _Ticket) -> torch.Tensor:
        arriving, self._arriving = self._arriving, None
        return arriving[1] if arriving is not None and arriving[0] is ticket else ticket.fetch()
