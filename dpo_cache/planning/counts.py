"""Peaks of memory that a plan counts on fake tensors; ways to train that share a peak count it once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig

from dpo_cache.planning.layer_major import PhasePeaks, phase_peaks
from dpo_cache.planning.live_reference import live_reference_peak
from dpo_cache.planning.parts import Method
from dpo_cache.planning.plain_step import passes_peak
from dpo_cache.planning.workload import Workload
from dpo_cache.types import Completion


@dataclass
class Counts:
    """Peaks of passes over the longest step of the workload. Quantized weights change none of them."""

    config: PreTrainedConfig
    workload: Workload
    device_type: str
    auto_tokens: int | None = (
        None  # tokens at once under `budget_tokens` auto, which splits no pair; None: not auto
    )
    _known: dict[Any, Any] = field(default_factory=dict)

    def plain(self, method: Method, recomputation: str, tokens: int, *, alike: bool, gradients: int) -> int:
        """See `passes_peak`."""
        key = "plain", _counted(method), recomputation, tokens
        if key not in self._known:
            self._known[key] = passes_peak(
                self.config,
                method,
                self.forests(tokens),
                recomputation=recomputation,
                alike=alike,
                gradients=gradients,
                device_type=self.device_type,
            )
        return self._known[key]

    def layer_major(self, method: Method, recomputation: str, tokens: int, *, alike: bool) -> PhasePeaks:
        """See `phase_peaks`."""
        key = "layer-major", _counted(method), recomputation, tokens
        if key not in self._known:
            self._known[key] = phase_peaks(
                self.config,
                method,
                self.forests(tokens),
                alike=alike,
                recomputation=recomputation,
                device_type=self.device_type,
            )
        return self._known[key]

    def live_reference(self, method: Method, tokens: int, *, alike: bool) -> int:
        """See `live_reference_peak`; a micro-batch has the pairs of the largest forest."""
        key = "live reference", _counted(method), tokens
        if key not in self._known:
            largest = self.workload.forests(tokens)[0]
            self._known[key] = live_reference_peak(self.config, method, largest, alike=alike)
        return self._known[key]

    def forests(self, tokens: int) -> Sequence[Sequence[Completion]]:
        """The forests of the longest step, with at most so many tokens each, largest first."""
        key = "forests", tokens
        if key not in self._known:
            splits = tokens != self.auto_tokens
            self._known[key] = self.workload.forests(tokens, splits_pairs=splits)
        return self._known[key]


def _counted(method: Method) -> Method:
    """The method without the settings that change no activation, as a key of counts."""
    return replace(method, quantize=None, optimizer="none", rounding="nearest")
