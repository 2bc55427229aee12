"""Fits a step into memory: with small forests, long pairs in two runs, and recomputed activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.lm.budget import is_out_of_memory
from dpo_cache.lm.memory.recompute import MODES, Recomputation, activation_bytes, ladder
from dpo_cache.lm.policy import default_micro_tokens
from dpo_cache.log import Log
from dpo_cache.training.ranks import Ranks

MIN_TOKENS = 64
SHARE_OF_FREE = 0.5  # share of a host's free memory for activations; others are recomputed


class StepMemory:
    """Steps run `micro_tokens` at once, pairs of more than `pair_tokens` one answer at a time, under `mode`.

    In a layer-major step, `mode` applies within each layer while it is run again for its gradient.

    All three change when memory runs out; the result of the step does not. `micro_tokens` None: as many as
    keep the device busy. Then a longer pair is run as a whole as long as memory suffices, which is faster. No
    forest has more than `most_tokens`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recomputation: Recomputation,
        micro_tokens: int | None,
        requested: str,
        log: Log,
        *,
        precision: str = "fp32",
        is_deterministic: bool = False,
        most_tokens: int | None = None,
        is_layer_major: bool = False,
        less_memory: Callable[[], str] = lambda: "",
    ):
        self._most_tokens = math.inf if most_tokens is None else most_tokens
        self.micro_tokens = int(min(micro_tokens or default_micro_tokens(model.device), self._most_tokens))
        self._requested = [micro_tokens, requested]
        self._is_fixed, self._log, self._device = requested != "auto", log, model.device
        self._recomputation = recomputation
        # a layer-major step recomputes each layer from its input in any case
        self._ladder = ladder(precision)[:1] if is_layer_major else ladder(precision)
        share = 1 / max(1, recomputation.num_layers) if is_layer_major else 1.0
        # modes differ in rounding, and free memory changes
        modes = self._ladder[:1] if is_deterministic else self._ladder
        fitting = _mode_that_fits(model, self.micro_tokens, modes, share)
        self._recomputation.mode = requested if self._is_fixed else fitting
        self.pair_tokens: float = micro_tokens or math.inf
        if not micro_tokens and not is_deterministic:
            self.pair_tokens = max(self.micro_tokens, _tokens_that_fit(model, self.mode, share))
        self.pair_tokens = min(self.pair_tokens, self._most_tokens)
        self._less_memory = less_memory
        self._problem_of: Callable[[str], str] = lambda _: ""
        if not self._recomputation.num_layers and requested not in ("auto", "none"):
            log(
                f"`gradient_checkpointing` {requested} has no effect: {type(model).__name__} has no "
                "layers that take it."
            )

    def state(self) -> dict[str, Any]:
        """The values for a checkpoint, so that a resumed run splits its steps in the same way, with equal
        bits.
        """
        return {
            "requested": self._requested,
            "micro_tokens": self.micro_tokens,
            "pair_tokens": None if math.isinf(self.pair_tokens) else self.pair_tokens,
            "mode": self.mode,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the values of `state`, unless other options are given now."""
        if state["requested"] == self._requested:
            self.micro_tokens = int(min(state["micro_tokens"], self._most_tokens))
            pair_tokens = math.inf if state["pair_tokens"] is None else state["pair_tokens"]
            self.pair_tokens = min(pair_tokens, self._most_tokens)
            self._recomputation.mode = state["mode"]

    def agree(self, ranks: Ranks) -> None:
        """Continue with the smallest values of all ranks, and the mode that keeps the least."""
        found = ranks.gather((self.micro_tokens, self.pair_tokens, MODES.index(self.mode)))
        self.micro_tokens, self.pair_tokens = (min(values) for values in list(zip(*found, strict=True))[:2])
        self._recomputation.mode = MODES[max(mode for _, _, mode in found)]

    def use_right_modes(self, problem_of: Callable[[str], str]) -> None:
        """From now on recompute only in modes for which `problem_of` finds no problem. If it finds one for
        the present mode, continue with another, and log that.
        """
        self._problem_of = problem_of
        if problem := problem_of(self.mode):
            place = MODES.index(self.mode)
            others = [*MODES[place + 1 :], *reversed(MODES[:place])]
            right = next(mode for mode in others if mode == "none" or not problem_of(mode))
            self._log(
                f"`gradient_checkpointing` {self.mode} {problem} on a short pair; continuing with {right}."
            )
            self._recomputation.mode = right

    @property
    def mode(self) -> str:
        """The activations that are recomputed, as one of `recompute.MODES`."""
        return self._recomputation.mode

    def advice(self, *, shards: bool) -> str:
        """The options with which a run of several ranks takes less memory on each rank."""
        fewer = (
            f"`budget_tokens` {max(MIN_TOKENS, self.micro_tokens // 2)} with `gradient_checkpointing` full"
        )
        if shards:
            return f"{fewer}, or with more ranks"
        others = [hint] if (hint := self._less_memory()) else []
        return ", ".join([*others, "`parallel` fsdp"]) + f", or {fewer}"

    def save_more(self, error: RuntimeError) -> None:
        """After a step ran out of memory, change one value for the next attempt.

        Raises the error if it has another cause, and `TrainingError` if no value is left to change.
        """
        if not is_out_of_memory(error, self._device):
            raise error
        # MPS has its own message
        problem = "out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error)
        less = [mode for mode in self._ladder if MODES.index(mode) > MODES.index(self.mode)]
        if self._is_fixed or not self._recomputation.num_layers:
            less = []
        if right := next((mode for mode in less if not self._problem_of(mode)), None):
            self._recomputation.mode = right
            change = f"`gradient_checkpointing` {self.mode}"
        elif self.pair_tokens > self.micro_tokens:
            self.pair_tokens = self.micro_tokens
            change = f"pairs of more than {self.micro_tokens:,} tokens one answer at a time"
        elif self.micro_tokens // 2 >= MIN_TOKENS:
            self.micro_tokens //= 2
            self.pair_tokens = self.micro_tokens
            change = f"`budget_tokens` {self.micro_tokens}"
        else:
            hint = self._less_memory()
            raise TrainingError(
                f"{problem} even with one answer at once.\n"
                f"Use {hint + ', ' if hint else ''}`precision` bf16, score with a shorter `max_length`, or a "
                "device with more memory; `dpo-cache plan` shows what fits."
            ) from error
        self._log(f"{problem}; the step is repeated, and the run continues, with {change}. Nothing is lost.")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> float:
    """The free memory of a host, where running out ends the process; infinite for other devices, which raise
    an error.
    """
    return psutil.virtual_memory().available if device.type == "cpu" else math.inf


def _tokens_that_fit(model: PreTrainedModel, mode: str, share: float) -> float:
    """The tokens whose activations fit into free memory, if this share of the layers keeps them at once."""
    per_token = share * activation_bytes(model, 1, mode)
    return SHARE_OF_FREE * _free_bytes(model.device) // per_token if per_token else math.inf


def _mode_that_fits(model: PreTrainedModel, micro_tokens: int, modes: Sequence[str], share: float) -> str:
    """The first of the modes that fits into free memory, or the last one."""
    most = SHARE_OF_FREE * _free_bytes(model.device)
    fitting = (mode for mode in modes if share * activation_bytes(model, micro_tokens, mode) < most)
    return next(fitting, modes[-1])
