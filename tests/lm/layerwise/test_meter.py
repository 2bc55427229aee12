"""How many tokens a window may have, by the time that earlier ones took."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dpo_cache.lm.layerwise.meter import FIRST_TOKENS, READINGS, WINDOW_S, Meter

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, _: torch.device, *, waits: bool) -> float:
        return self.time

    @contextmanager
    def reading(self, elapsed_s: float) -> Iterator[None]:
        self.time += elapsed_s
        yield


def run_window(meter: Meter, clock: Clock, num_tokens: int, compute_s: float, reading_s: float) -> None:
    watch = meter.start(CPU)
    for _ in range(4):
        with watch.waiting_for(clock.reading(reading_s / 4)):
            clock.time += compute_s / 4
    watch.stop(num_tokens)


def test_the_speed_leaves_out_the_time_that_weights_are_waited_for() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert meter.most_tokens == FIRST_TOKENS
    run_window(meter, clock, 1000, compute_s=10.0, reading_s=2.0)
    assert meter.tokens_per_s == pytest.approx(100.0)
    assert (meter.num_readings, meter.reading_s) == (1, pytest.approx(2.0))
    assert meter.most_tokens == pytest.approx(100 * WINDOW_S)


def test_windows_of_slow_readings_are_longer() -> None:
    clock = Clock()
    meter = Meter(clock)
    run_window(meter, clock, 1000, compute_s=10.0, reading_s=90.0)
    run_window(meter, clock, 1000, compute_s=20.0, reading_s=1.0)
    assert meter.window_s == pytest.approx(90 * READINGS) and WINDOW_S < 90 * READINGS
    assert meter.tokens_per_s == pytest.approx(100.0), "the best: later ones may wait for other work"
