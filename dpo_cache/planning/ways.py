"""The ways to train a model, from the fastest down, and the memory that each needs.

A way is a choice of trained weights (all, an adapter, an adapter on 4 bits), a preset of `memory`, and
smaller settings that change no result: which activations are recomputed, and how many tokens run at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from dpo_cache.lm.forest.layout import count_forest_tokens
from dpo_cache.lm.layerwise.record import NotLayerMajorError
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.placement import PRESETS, Placement, placement_of
from dpo_cache.options.plan import PlanOptions
from dpo_cache.planning.counts import Counts
from dpo_cache.planning.footprint import build_fake
from dpo_cache.planning.parts import LORA_RANK, Method, Parts
from dpo_cache.planning.placed import (
    ModelBytes,
    live_reference_parts,
    measure_model,
    placed_parts,
    placement_there,
    plain_parts,
    waiting_inputs,
)
from dpo_cache.planning.timing import (
    Operations,
    Transfers,
    count_operations,
    passes_of,
    step_operations,
    transfers_of,
)
from dpo_cache.planning.workload import Workload

CONTEXT_BYTES = 500_000_000  # the CUDA context of each process
FRAGMENTATION = 0.1  # added share of activations, inputs and buffers, which are allocated and freed
PROCESS_BYTES = 1_500_000_000  # Python, torch and its libraries, on the host
DEFAULT_TOKENS = {"cpu": 1024}  # tokens at once at the start of `train`; on other devices 4,096
MORE_TOKENS, FEWER_TOKENS = 4096, 1024


@dataclass(frozen=True)
class Way:
    """One way to train, and its predicted memory."""

    method: Method
    memory: str  # the preset; "place" where entries of `place` are given
    placement: Placement
    recomputation: str | None  # None: layer-major steps compute each layer again
    budget_tokens: int
    device: Parts
    host: Parts
    transfers: Transfers | None
    operations: float  # floating-point operations of a step


def counts_of(config: PreTrainedConfig, workload: Workload, options: PlanOptions) -> Counts:
    """What the ways of a plan count."""
    is_auto = number_or_auto("budget_tokens", options.budget_tokens) is None
    auto_tokens = DEFAULT_TOKENS.get(options.device, MORE_TOKENS) if is_auto else None
    return Counts(config, workload, options.device, auto_tokens)


def device_need(parts: Parts) -> int:
    """Bytes of a CUDA device that these parts need, with the CUDA context and fragmentation."""
    standing = parts.weights + parts.gradients + parts.optimizer
    return round(parts.total + CONTEXT_BYTES + FRAGMENTATION * (parts.total - standing))


def host_need(parts: Parts) -> int:
    """Bytes of the host that these parts and the process need."""
    return parts.total + PROCESS_BYTES


def methods_of(options: PlanOptions) -> list[Method]:
    """The methods to plan for: one if the options fix it, otherwise all that they allow."""
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if options.device == "cuda" else "fp32"
    base = Method(
        precision,
        options.optimizer.removesuffix("-paged"),  # paged is a placement
        "stochastic" if options.rounding == "auto" else options.rounding,
    )
    quantized = None if options.quantize == "none" else options.quantize
    adapter = replace(base, lora_r=options.lora_r or LORA_RANK, lora_targets=options.lora_targets)
    if quantized:
        return [replace(adapter, quantize=quantized)]
    return [*([] if options.lora_r else [base]), adapter, replace(adapter, quantize="4bit")]


@dataclass
class Candidates:
    """The ways of one method, which `variants` counts one after the other."""

    counts: Counts
    options: PlanOptions
    method: Method
    seconds_per_operation: float
    refused: str = ""  # the reason why the model cannot run layer by layer

    @cached_property
    def sizes(self) -> ModelBytes:
        return measure_model(self.counts.config, self.method)

    @cached_property
    def operations(self) -> Operations:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return count_operations(build_fake(self.counts.config, self.method.dtype))

    def live_reference(self) -> Parts:
        """The memory of DPO with a live reference, with as many pairs at once as a forest has."""
        peak = self.counts.live_reference(self.method, self.default_tokens, alike=self.sizes.alike)
        return live_reference_parts(self.sizes, peak)

    def presets(self) -> list[tuple[str, Placement]]:
        """The presets to try, from the fastest down; only one if the options name it."""
        is_adapted = self.method.lora_r is not None
        fixed = self.options.placement(is_adapted=is_adapted)
        if fixed is not None:
            has_entries = self.options.entries(is_adapted=is_adapted) is not None
            return [("place" if has_entries else self.options.memory, fixed)]
        found = [(name, placement_of(name, None, is_adapted=is_adapted)) for name in PRESETS]
        return [(name, placement) for name, placement in found if placement is not None]

    def variants(self, name: str, placement: Placement) -> Iterator[Way]:
        """The ways under one preset, each with less memory than the one before; none if the model cannot run
        so.
        """
        for recomputation in self._recomputations(placement):
            for tokens in self._budgets(is_last=recomputation in ("full", None)):
                try:
                    yield self._way(name, placement, recomputation, tokens)
                except NotLayerMajorError as error:
                    self.refused = str(error)
                    return

    def _recomputations(self, placement: Placement) -> Sequence[str | None]:
        if placement.is_layer_major:
            return (None,)
        chosen = self.options.gradient_checkpointing
        return ("cheap", "full") if chosen == "auto" else (chosen,)

    def _budgets(self, *, is_last: bool) -> Sequence[int]:
        if number_or_auto("budget_tokens", self.options.budget_tokens):
            return (self.default_tokens,)
        fewer = [FEWER_TOKENS] if is_last and self.default_tokens > FEWER_TOKENS else []
        return [self.default_tokens, *fewer]

    @property
    def default_tokens(self) -> int:
        """The default number of tokens at once."""
        fixed = number_or_auto("budget_tokens", self.options.budget_tokens)
        return fixed or DEFAULT_TOKENS.get(self.options.device, MORE_TOKENS)

    def _way(self, name: str, placement: Placement, recomputation: str | None, tokens: int) -> Way:
        counts, sizes, batch_size = self.counts, self.sizes, self.options.batch_size
        is_adapted = self.method.lora_r is not None
        passes = passes_of(is_adapted=is_adapted, recomputes_layers=recomputation in ("full", None))
        operations = step_operations(self.operations, counts.workload, batch_size, passes=passes)
        transfers = None
        if recomputation is not None:
            peak = counts.plain(
                self.method, recomputation, tokens, alike=sizes.alike, gradients=sizes.trained
            )
            device, host = plain_parts(sizes, peak), Parts()
        else:
            chosen = self.options.gradient_checkpointing
            within = "cheap" if chosen == "auto" else chosen  # a layer that is run again for its gradient
            peaks = counts.layer_major(self.method, within, tokens, alike=sizes.alike)
            forests = counts.forests(tokens)
            placement = placement_there(placement, self.options.device)
            device, host = placed_parts(sizes, peaks, placement, forests, self.method)
            step_tokens = batch_size * counts.workload.pair_tokens
            # those of a mean step, while the memory is that of the longest step
            share = step_tokens / max(1, sum(map(count_forest_tokens, forests)))
            inputs = round(waiting_inputs(sizes, peaks, forests) * share)
            per_token = operations * self.seconds_per_operation / max(1.0, step_tokens)
            transfers = transfers_of(sizes, placement, inputs, step_tokens, per_token)
        return Way(self.method, name, placement, recomputation, tokens, device, host, transfers, operations)
