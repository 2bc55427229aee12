"""How long windows take, and how long they wait for weights: how many tokens the next one should have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from dpo_cache.lm.budget import now

WINDOW_S = 300.0  # seconds that a window may take, which a crash can cost
READINGS = 10.0  # or so many times the time to read the weights, if that is longer
FIRST_TOKENS = 4096  # tokens of a window until the speed is known


class Meter:
    """Measurements over all windows of a model."""

    def __init__(self, clock: Callable[..., float] = now):
        self.num_readings = 0  # times that all weights were read
        self.tokens_per_s = 0.0  # the best so far, without waiting for weights
        self.reading_s = 0.0  # the longest that a window waited for weights
        self._clock = clock

    @property
    def window_s(self) -> float:
        """The seconds that a window may take."""
        return max(WINDOW_S, READINGS * self.reading_s)

    @property
    def most_tokens(self) -> float:
        """Tokens that a window may have."""
        return self.tokens_per_s * self.window_s or FIRST_TOKENS

    def start(self, device: torch.device) -> Watch:
        """Time a window that goes through all layers."""
        return Watch(self, partial(self._clock, device))


class Watch:
    """The time of one window."""

    def __init__(self, meter: Meter, clock: Callable[..., float]):
        self._meter, self._clock = meter, clock
        self._started, self._waited_s = clock(waits=True), 0.0

    @contextmanager
    def waiting_for(self, weights: AbstractContextManager[None]) -> Iterator[None]:
        """Open the weights; the time until they are there is that of reading."""
        before = self._clock(waits=False)  # the device still works
        with weights:
            self._waited_s += self._clock(waits=False) - before
            yield

    def stop(self, num_tokens: int) -> None:
        meter, elapsed_s = self._meter, self._clock(waits=True) - self._started - self._waited_s
        meter.num_readings += 1
        meter.reading_s = max(meter.reading_s, self._waited_s)
        if elapsed_s > 0:
            meter.tokens_per_s = max(meter.tokens_per_s, num_tokens / elapsed_s)
