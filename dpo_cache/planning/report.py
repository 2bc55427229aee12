"""The report of `plan`: plain values, which `--json` prints."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpo_cache.planning.html import plan_html
from dpo_cache.planning.parts import Parts
from dpo_cache.planning.timing import Transfers


@dataclass
class PlannedData:
    """The pairs, lengths in tokens."""

    source: str
    is_assumed: bool
    num_pairs: int
    mean_prompt: float
    mean_answer: float
    longest: int
    data_tokens: int  # every prompt with each of its answers
    forest_tokens: int  # every shared prefix once: what scoring runs


@dataclass
class PlannedScoring:
    """A way to score the reference with `precompute`; sizes in bytes."""

    reference: str  # the dtype of the weights, or their bits
    budget_tokens: int
    is_streamed: bool  # a layer's weights are on the device only while it runs
    device: Parts
    device_bytes: int  # needed, with context and fragmentation
    host_bytes: int  # needed, with the memory of the process
    seconds: float | None
    fits: list[str]  # the cards
    command: str


@dataclass
class PlannedTraining:
    """A way to train; sizes in bytes."""

    method: str
    memory: str
    place: str
    gradient_checkpointing: str | None  # None: each layer is computed again
    budget_tokens: int
    device: Parts
    host: Parts
    device_bytes: int  # needed, with context and fragmentation
    host_bytes: int  # needed, with the memory of the process
    live_reference_bytes: int | None  # needed by DPO with a live reference; None: could not be counted
    step_seconds: float | None
    seconds: float | None
    transfers: Transfers | None
    checkpoint_bytes: int
    model_bytes: int  # size of the trained model or adapter on the disk
    fits: list[str]
    command: str


@dataclass
class PlanReport:
    """The result of `plan`."""

    model: str
    num_parameters: int
    device: str  # the kind of device that is planned for
    data: PlannedData
    num_steps: int
    tflops: float
    tflops_source: str  # the option, or the device of the measurement
    link_gbs: float
    cards: list[str]
    cache_bytes: int
    precompute: list[PlannedScoring]
    train: list[PlannedTraining]  # the ways of each method, fastest first
    assumptions: list[str]
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        fitting = sum(bool(way.fits) for way in self.train)
        return f"<PlanReport of {self.model}: {fitting} of {len(self.train)} ways to train fit>"

    def _repr_html_(self) -> str:
        return plan_html(self)
