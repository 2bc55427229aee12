"""How a step fits into memory: the size of its forests, and what is computed again in the backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.recomputation import MODES, Recomputation, activation_bytes, is_kept_changed

LEAST_TOKENS = 64
SHARE_OF_FREE = 0.5  # of a host's free memory that activations may take before they are computed again


class Thrift:
    """`micro_tokens` at once, under `mode`; both change when memory runs out, never the result of a step."""

    def __init__(self, model: PreTrainedModel, micro_tokens: int, requested: str, say: Callable[[str], None]):
        self.micro_tokens, self._is_fixed, self._say, self._device = micro_tokens, requested != "auto", say, model.device
        self._recomputation = Recomputation(model)
        self._recomputation.mode = requested if self._is_fixed else _mode_that_fits(model, micro_tokens)
        if not self._recomputation.num_layers and requested in ("selective", "full"):
            say(f"--gradient-checkpointing {requested} has no effect: {type(model).__name__} has no layers that take it.")

    @property
    def mode(self) -> str:
        """What is computed again: one of `recomputation.MODES`."""
        return self._recomputation.mode

    def save_more(self, error: RuntimeError) -> None:
        """After a step ran out of memory: what to change before it is tried again. Raises the error where it is another one,
        and `TrainingError` where nothing is left to change."""
        if is_kept_changed(error):
            self._recomputation.mode = "full"
            self._say("--gradient-checkpointing selective does not suit this model, which changes in place what is kept; going on with full.")
            return
        if not is_out_of_memory(error, self._device):
            raise error
        problem = "out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error)  # MPS: whatever it says
        place = MODES.index(self.mode)
        if not self._is_fixed and self._recomputation.num_layers and place + 1 < len(MODES):
            self._recomputation.mode = MODES[place + 1]
            change = f"--gradient-checkpointing {self.mode}"
        elif self.micro_tokens // 2 >= LEAST_TOKENS:
            self.micro_tokens //= 2
            change = f"--micro-tokens {self.micro_tokens}"
        else:
            raise TrainingError(
                f"{problem} even with one pair at once.\nUse --precision bf16, score with a shorter --max-length, or a device with more memory."
            ) from error
        self._say(f"{problem}; the step is taken again, and the run goes on, with {change}. Nothing is lost.")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _mode_that_fits(model: PreTrainedModel, micro_tokens: int) -> str:
    """On a host, where running out of memory ends the process, the first mode that fits; elsewhere the fastest, until memory runs out."""
    if model.device.type != "cpu" or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return MODES[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = (mode for mode in MODES if activation_bytes(model, micro_tokens, mode) < SHARE_OF_FREE * free)
    return next(fits, MODES[-1])
