"""How many tokens are run at once: found by trials, and halved where memory runs out."""

from __future__ import annotations

import time

import torch

from dpo_cache.errors import ModelError, first_line
from dpo_cache.log import Log

# Sizes to try, in this order: the first is safe anywhere, the last fills the device.
SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192, 16384, 32768), "mps": (1024, 2048, 4096)}
MIN_SPEEDUP = 1.03  # how much faster a larger chunk must be to be worth its memory
TRIALS_PER_SIZE = 2  # chunks of each size; the first of all also warms up
MIN_TOKENS = 32


class Budget:
    """How many tokens the next chunk has. `note` records a chunk's time, `halve` one that did not fit."""

    def __init__(self, tokens: int | None, device: torch.device, log: Log):
        """A fixed number of tokens, or None to find a good one in the first chunks."""
        sizes = SIZES.get(device.type, SIZES["cpu"])
        self.tokens = tokens or sizes[0]
        self._log = log
        self.has_stopped = tokens is not None  # the search
        self._untried = list(sizes[1:])
        self._speeds: list[float] = []  # speeds at the current size
        self._best = (0.0, self.tokens)

    @property
    def trial_tokens(self) -> int:
        """The size that is tried; 0 after the search."""
        return 0 if self.has_stopped else self.tokens

    def keep_below(self, most_tokens: int | None) -> None:
        """Run no larger chunks than these from now on; None: no limit."""
        if most_tokens is None:
            return
        self.tokens = min(self.tokens, most_tokens)
        self._untried = [size for size in self._untried if size <= most_tokens]
        self._best = self._best[0], min(self._best[1], most_tokens)

    def note(self, num_tokens: int, elapsed_s: float) -> None:
        """Record that a chunk was run. During the search, `elapsed_s` must include the device's work: see
        `now`.
        """
        if self.has_stopped or num_tokens < self.tokens:
            return
        self._speeds.append(num_tokens / elapsed_s)
        if len(self._speeds) < TRIALS_PER_SIZE:
            return
        speed, self._speeds = max(self._speeds), []
        if speed < self._best[0] * MIN_SPEEDUP:
            self.tokens, self.has_stopped = self._best[1], True
        elif not self._untried:
            self.has_stopped = True
        else:
            self._best = speed, self.tokens
            self.tokens = self._untried.pop(0)

    def halve(self, error: BaseException) -> None:
        """Continue with half the tokens, for memory ran out. Raises `ModelError` where half is too few."""
        half = self.tokens // 2
        problem = "out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error)
        if half < MIN_TOKENS:
            raise ModelError(
                f"{problem} even with {self.tokens} tokens at once.\n"
                "Use `dtype` bfloat16, a shorter `max_length`, or a device with more memory; "
                "`dpo-cache plan` shows what fits. Scores so far are kept."
            ) from error
        self._log(f"{problem} with {self.tokens} tokens at once; continuing with {half}. Nothing is lost.")
        self.tokens, self.has_stopped = half, True


def is_out_of_memory(error: BaseException, device: torch.device) -> bool:
    """Return whether a smaller chunk may help. MPS raises a plain `RuntimeError`, so `halve` shows its
    message.
    """
    return isinstance(error, torch.OutOfMemoryError) or (device.type == "mps" and type(error) is RuntimeError)


def now(device: torch.device, *, waits: bool) -> float:
    """The clock's time in seconds; with `waits`, after the device has finished its queued work."""
    if waits and device.type == "cuda":
        torch.cuda.synchronize(device)
    elif waits and device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
