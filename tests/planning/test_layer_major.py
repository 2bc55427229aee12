"""The counted peaks of layer-major steps are those of torch's allocator, if what waits is outside of it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dpo_cache.lm.layerwise.policy import LayerMajorRun
from dpo_cache.lm.layerwise.record import find_layers
from dpo_cache.lm.layerwise.weights import ResidentWeights
from dpo_cache.lm.policy import PolicyModel, decoder_pass
from dpo_cache.lm.self_check import AttentionChoice
from dpo_cache.planning.footprint import _add_adapters, policy_of
from dpo_cache.planning.layer_major import PhasePeaks, phase_peaks
from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.planning.parts import Method
from dpo_cache.types import Completion
from tests.conftest import make_llama
from tests.planning.test_footprint import SIZES, pairs
from tests.planning.test_plain_step import WIDE

FOREST = AttentionChoice("forest", "", has_plain_head=True)


class StatesInNumpy:
    """Keeps states in numpy's memory, which torch's allocator does not see, as a device's does not see the
    host's. One state leaves, and one arrives ahead, as with copies that overlap.
    """

    @dataclass
    class Ticket:
        values: np.ndarray
        arriving: torch.Tensor | None = None

    def __init__(self) -> None:
        self.leaving: torch.Tensor | None = None

    def put(self, state: torch.Tensor) -> Ticket:
        self.leaving = state
        return self.Ticket(state.detach().numpy().copy())

    def expect(self, ticket: Ticket) -> None:
        ticket.arriving = torch.empty(ticket.values.shape).copy_(torch.from_numpy(ticket.values))

    def get(self, ticket: Ticket) -> torch.Tensor:
        if ticket.arriving is None:
            self.expect(ticket)
        state, ticket.arriving = ticket.arriving, None
        assert state is not None
        return state


def measured(model: torch.nn.Module, forests: list[list[Completion]]) -> int:
    with torch.no_grad():
        layers = find_layers(model, **decoder_pass(model, forests[-1], FOREST).arguments)
    run = LayerMajorRun(PolicyModel(model, FOREST), layers, ResidentWeights(), StatesInNumpy())

    def step() -> None:
        run.forward(forests)
        for place in range(len(forests)):
            run.logps(place).sums().sum().backward()
            run.end_top(place)
        model.zero_grad(set_to_none=True)
        run.backward(lambda _: model.zero_grad(set_to_none=True))

    return allocated_peak(step)


def highest(peaks: PhasePeaks) -> int:
    return max(peaks.forward, peaks.top, peaks.backward, peaks.bottom)


@pytest.mark.rotating(3)
@pytest.mark.parametrize("lora_r", [None, 4])
@pytest.mark.parametrize("num_forests", [1, 2, 4])
def test_the_peak_is_the_allocators(num_forests: int, lora_r: int | None) -> None:
    sizes = {**WIDE, "num_hidden_layers": 4}
    model, forests = make_llama(**sizes), [pairs(2) for _ in range(num_forests)]
    config = model.config
    if lora_r:
        pytest.importorskip("peft")
        _add_adapters(model, lora_r)
    method = Method("fp32", lora_r=lora_r)
    counted = phase_peaks(config, method, forests, alike=True, device_type="cpu")
    assert highest(counted) == pytest.approx(measured(policy_of(model, "cheap"), forests), rel=0.05)


def test_the_peak_does_not_grow_with_the_layers() -> None:
    forests = [pairs(1), pairs(1)]
    found = [
        phase_peaks(make_llama(num_hidden_layers=layers).config, Method("fp32"), forests, alike=alike)
        for layers, alike in ((3, False), (7, False), (7, True))
    ]
    assert found[0] == found[1] == found[2]


def test_a_state_is_that_of_the_largest_forest() -> None:
    found = phase_peaks(make_llama(**SIZES).config, Method("fp32"), [pairs(3), pairs(1)], alike=True)
    assert found.state == 3 * (60 + 40 + 47) * 64 * 4
