"""A planned run: the completions to score, their cache, and the publication of its pair sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpo_cache import data
from dpo_cache.log import Log
from dpo_cache.options.base import number_or_auto
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.precomputing.audit import AuditTotals
from dpo_cache.precomputing.cutting import Units, UnitSize
from dpo_cache.precomputing.fresh_keys import FreshKeys
from dpo_cache.precomputing.inputs import Inputs
from dpo_cache.precomputing.nominal_speed import nominal_tokens_per_s
from dpo_cache.precomputing.pair_sets import describe_split, publish_pair_set
from dpo_cache.precomputing.reference import Target
from dpo_cache.precomputing.report import OnProgress, PrecomputeReport
from dpo_cache.precomputing.template_days import forget_day
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.windows import Entry, SplitPlan, Totals, Window
from dpo_cache.store.format.documents import Document
from dpo_cache.store.upkeep.run_record import RunRecord

if TYPE_CHECKING:
    from dpo_cache.lm.streaming import Readings, Streaming


@dataclass(frozen=True)
class PlannedRun:
    """The splits of a run and the destination of their scores. For streams, `plan` plans each window when it
    is its turn.
    """

    inputs: Inputs
    name: str  # name of the pair sets, without the split
    splits: Sequence[SplitPlan]
    truncation: data.Truncation
    tokenization: Document
    target: Target
    totals: Totals
    report: PrecomputeReport
    longest: Sequence[Entry]  # the longest completion that the cache lacks, as far as that is known
    streaming: Streaming | None
    readings: Readings | None
    plan: Callable[[SplitPlan], Iterator[Window]] | None
    on_progress: OnProgress
    log: Log
    size: UnitSize | None = field(init=False)
    units: Units = field(init=False)

    def __post_init__(self) -> None:
        size = self._unit_size()
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "units", Units(FreshKeys(self.target.scores), self.truncation, size))

    @property
    def options(self) -> PrecomputeOptions:
        return self.inputs.options

    def draw(self, split: SplitPlan) -> Iterator[Unit]:
        """Yield the units of the split that no run has scored."""
        windows: Iterable[Window] = self.plan(split) if self.plan else split.windows
        return self.units.draw(windows, split.survey.pair_set)

    def extent(self) -> tuple[int, int]:
        """The tokens of the longest row, and the number of tokens to score as far as they are planned."""
        longest = self.options.max_length if self.plan else max(split.survey.longest for split in self.splits)
        return longest, self.totals.missing_tokens

    def check_writable(self) -> None:
        """Raise `StorageError` where the scores or the pair sets could not be published."""
        folder = f"references/{self.target.reference.id}"
        pair_sets = [f"pairs/{self.name}/{split.name}/manifest.json" for split in self.splits]
        self.target.cache.check_writable([f"{folder}/run", f"{folder}/scores/shard", *pair_sets])

    def publish(self, split: SplitPlan, audited: AuditTotals | None, record: RunRecord) -> None:
        """Publish the split's pairs with their scores, all of which are in the cache."""
        options, reference = self.options, self.target.reference
        details = describe_split(self.inputs, split, self.name, reference, self.tokenization, audited)
        self.report.bytes_written += publish_pair_set(
            split, self.target, self.truncation, details, record, self.log, overwrite=options.overwrite
        )
        forget_day(self.target.cache, split.survey.pair_set, split.template_date)

    def _unit_size(self) -> UnitSize | None:
        """The size of units; None for whole windows, for each of which streamed weights are read once.

        The driver sets the number of workers once it is known.
        """
        options, reference = self.options, self.target.reference
        fixed = number_or_auto("unit_tokens", options.unit_tokens)
        one_each = fixed is None and (self.streaming is not None or options.stream_weights == "on")
        if one_each and (self.plan or not options.uses_workers):
            return None
        size = UnitSize(
            fixed,
            one_each=one_each,
            num_workers=options.num_workers or 1,
            run_tokens=lambda: self.totals.missing_tokens,
        )
        if options.ray is not None and self.totals.missing_tokens:  # all units are cut before the first one
            cores = options.cpus_per_worker or 1
            speed = nominal_tokens_per_s(options.model, options.revision, reference.device.type, cores)
            size.note(round(speed), 1.0)
        return size
