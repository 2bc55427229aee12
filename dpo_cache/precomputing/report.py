"""The report of `precompute`, counted while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_cache import data
from dpo_cache.lm.model.unchanged import check_not_rewritten
from dpo_cache.lm.progress import ScoringProgress, ScoringStep, extrapolate
from dpo_cache.planning.forecast import Forecast
from dpo_cache.precomputing.audit import Audit, AuditTotals
from dpo_cache.precomputing.cutting import Units
from dpo_cache.precomputing.html import precompute_html
from dpo_cache.precomputing.reference import Target
from dpo_cache.precomputing.units import OnStep, Scored, Unit
from dpo_cache.precomputing.windows import Totals
from dpo_cache.store.upkeep.run_record import RunRecord

if TYPE_CHECKING:
    from dpo_cache.lm.streaming import Readings

OnProgress = Callable[[ScoringProgress], None]


@dataclass
class PrecomputeReport:
    """The result of `precompute`. Counts are sums over the splits; `surveys` has an entry for each."""

    pair_sets: list[str] = field(default_factory=list)
    cache: str = ""
    reference: str = ""
    attention: str | None = None  # None: no model was loaded
    budget_tokens: int | None = None  # tokens run through the model at once
    rows_read: int = 0
    pairs_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # number of rows for each reason
    rows_truncated: int = 0
    rows_moved_boundary: int = 0
    completions: int = 0
    distinct_completions: int = 0
    already_cached: int = 0
    scored_now: int = 0
    missing_tokens: int = 0  # tokens of the forest of the completions that the cache lacked
    data_tokens: int = 0  # prompt + answer of every completion kept, as an unpadded batch would run them
    model_tokens: int = 0  # tokens that the model ran
    elapsed_s: float = 0.0
    scoring_s: float = 0.0  # the part of it spent in the model
    pairs_per_s: float = 0.0
    num_workers: int = 0  # processes that scored at once; 0: this one scored
    scored_elsewhere: int = 0  # completions that other runs scored since this one was planned
    peak_bytes: int = 0  # with workers, the peak of the largest one
    audited: int = 0  # completions whose scores were compared with the model's own forward
    audited_tokens: int = 0
    audit_largest_gap: float | None = None  # nats a token; None: nothing was audited
    audit_mean_gap: float | None = None
    audit_too_long: int = 0  # completions that were left out, because their own forward needs too much memory
    audit_s: float = 0.0
    loaded_bytes: int = 0  # peak memory when the model had just been loaded
    # Where the weights were read from, layer by layer; None: they were kept on the device. In a dry run, how
    # often they would be read.
    weights_from: str | None = None
    weight_readings: int = 0
    weight_bytes_read: int = 0
    weight_read_s: float = 0.0  # at the speed that was measured beforehand
    bytes_written: int = 0
    forecast: Forecast | None = None  # only after a dry run
    surveys: list[dict[str, Any]] = field(default_factory=list)
    start_from: str | None = None  # model to train from, if the one in the reference's entry no longer exists
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<PrecomputeReport of {', '.join(self.pair_sets)}: {self.pairs_kept:,} pairs, "
            f"{self.scored_now:,} of {self.distinct_completions:,} completions scored now>"
        )

    def _repr_html_(self) -> str:
        return precompute_html(self)

    def add(self, survey: data.Survey) -> None:
        """Add the counts of one split."""
        self.rows_read += survey.rows_read
        self.pairs_kept += survey.pairs_kept
        for reason, finding in survey.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + finding.count
        self.rows_truncated += survey.truncated.count
        self.rows_moved_boundary += survey.moved_boundary.count
        self.completions += 2 * survey.pairs_kept
        self.data_tokens += survey.data_tokens
        self.surveys.append(survey.as_dict())

    def plan_readings(self, readings: Readings) -> None:
        """Record about how often the weights will be read."""
        self.weights_from = readings.place
        self.weight_readings, self.weight_bytes_read = readings.count, readings.num_bytes
        self.weight_read_s = readings.elapsed_s

    def add_readings(self, readings: tuple[str, int, int], bytes_per_s: float) -> None:
        """Add the readings of weights so far: place, count and bytes."""
        self.weights_from, self.weight_readings, self.weight_bytes_read = readings
        self.weight_read_s = self.weight_bytes_read / bytes_per_s

    def add_audit(self, totals: AuditTotals) -> None:
        """Add the totals of the audit."""
        self.audited, self.audited_tokens = totals.completions, totals.tokens
        self.audit_too_long, self.audit_s = totals.too_long, totals.elapsed_s
        if totals.completions:
            self.audit_largest_gap, self.audit_mean_gap = totals.largest_gap, totals.mean_gap


class Meter:
    """Audits scores, publishes them and counts them in the report, and reports the progress of the run."""

    def __init__(
        self,
        report: PrecomputeReport,
        target: Target,
        totals: Totals,
        units: Units,
        on_progress: OnProgress,
        record: RunRecord,
        audit: Audit | None,
    ):
        self._report, self._target, self._totals, self._units = report, target, totals, units
        self._on_progress, self._record, self._audit = on_progress, record, audit
        self._planned_tokens = 0  # tokens of the units up to the present one
        self._scored_before = 0.0  # seconds of scoring, before the present unit

    def watch(self, unit: Unit) -> OnStep:
        """The callback of `score_unit` for the next unit; the clock of its scoring starts now."""
        report = self._report
        started, scored_before, run_before = time.perf_counter(), report.scoring_s, report.model_tokens
        self._planned_tokens += unit.planned_tokens
        self._scored_before = scored_before

        def on_step(step: ScoringStep, num_waiting: int) -> None:
            report.model_tokens += step.num_tokens
            report.scoring_s = scored_before + time.perf_counter() - started
            self._on_progress(
                describe_progress(
                    report,
                    self._totals,
                    self._units,
                    unit.pair_set,
                    planned_tokens=self._planned_tokens,
                    run_tokens=run_before + step.total_tokens,
                    num_waiting=num_waiting,
                    trial_tokens=step.trial_tokens,
                )
            )

        return on_step

    def note_end(self, unit: Unit) -> None:
        """Record how long the unit took; the size of later units depends on it."""
        if self._units.size:
            self._units.size.note(unit.planned_tokens, self._report.scoring_s - self._scored_before)

    def publish(self, scored: Sequence[Scored]) -> None:
        """Audit the scores, publish the entry of their reference, and then store them durably. Raises
        `ModelError`.
        """
        check_not_rewritten()
        if self._audit:
            self._audit.check(scored)
        cache, reference = self._target.cache, self._target.reference
        cache.publish_reference(reference.identity, reference.provenance)
        self._report.bytes_written += self._target.scores.publish(scored, self._record.add_shard)
        self._report.scored_now += len(scored)


def describe_progress(
    report: PrecomputeReport,
    totals: Totals,
    units: Units,
    pair_set: str,
    *,
    planned_tokens: int,
    run_tokens: int,
    num_waiting: int = 0,
    num_workers: int = 0,
    trial_tokens: int = 0,
) -> ScoringProgress:
    """The progress of the run, if the rest takes as many tokens as the units so far did: `run_tokens`, where
    `planned_tokens` were planned. Completions that other runs have scored count neither as done nor as left.
    """
    left = max(0, totals.missing_tokens - units.tokens_elsewhere - planned_tokens)
    share = 1 - units.tokens_elsewhere / max(1, totals.missing_tokens)
    return ScoringProgress(
        pair_set,
        report.model_tokens,
        extrapolate(run_tokens, planned_tokens, planned_tokens + left),
        round(totals.missing_pairs * share),
        report.scored_now + num_waiting,
        report.scoring_s,
        num_workers,
        trial_tokens,
    )
