"""A planned run scored by this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache as call_once
from typing import TYPE_CHECKING

from dpo_cache.lm.device import peak_bytes
from dpo_cache.precomputing.audit import AuditTotals, open_audit
from dpo_cache.precomputing.planned import PlannedRun
from dpo_cache.precomputing.reference import open_reference
from dpo_cache.precomputing.report import Meter
from dpo_cache.precomputing.units import score_unit
from dpo_cache.store.upkeep.run_record import RunRecord

if TYPE_CHECKING:
    from dpo_cache.lm.runner import Runner


def score_here(run: PlannedRun, record: RunRecord) -> AuditTotals | None:
    """Score and publish one split after the other. Returns the totals of the audit; None without one."""
    audit = open_audit(run.options.audit, record, run.log)
    meter = Meter(run.report, run.target, run.totals, run.units, run.on_progress, record, audit)
    with _opened_if_needed(run) as open_runner:
        for split in run.splits:
            for unit in run.draw(split):
                runner = open_runner()
                if audit:
                    audit.begin(unit, runner, run.longest)
                score_unit(unit, runner, meter.publish, meter.watch(unit))
                meter.note_end(unit)
            run.publish(split, audit.totals if audit else None, record)
    return audit.totals if audit else None


@contextmanager
def _opened_if_needed(run: PlannedRun) -> Iterator[Callable[[], Runner]]:
    """Yield a function that loads the model when it is first called, after a check that the cache is
    writable.
    """
    report, device = run.report, run.target.reference.device
    with ExitStack() as stack:

        @call_once
        def open_runner() -> Runner:
            run.check_writable()
            longest, run_tokens = run.extent()
            opened = open_reference(
                run.inputs,
                run.target.reference,
                run.log,
                longest=longest,
                run_tokens=run_tokens,
                streaming=run.streaming,
            )
            runner = stack.enter_context(opened)
            report.attention = runner.attention.name
            if runner.layer_major is not None and run.readings is not None:
                found, speed = runner.layer_major, run.readings.bytes_per_s
                stack.callback(lambda: report.add_readings(found.readings, speed))
            report.loaded_bytes = peak_bytes(device)
            stack.callback(lambda: setattr(report, "budget_tokens", runner.budget.tokens))
            return runner

        yield open_runner
