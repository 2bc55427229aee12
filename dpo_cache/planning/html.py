"""The report of `plan` as HTML, for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cache.errors import shown_bytes
from dpo_cache.notebook.html import card, facts, folded, note, remarks, table
from dpo_cache.progress import format_seconds

if TYPE_CHECKING:
    from dpo_cache.planning.report import PlannedScoring, PlannedTraining, PlanReport


def plan_html(report: PlanReport) -> str:
    """Each way to score and to train, with its memory and time; a click shows commands and assumptions."""
    data = report.data
    ways: list[PlannedScoring | PlannedTraining] = [*report.precompute, *report.train]
    rows = [
        ("parameters", f"{report.num_parameters:,}"),
        ("pairs", f"{data.num_pairs:,} ({data.source})"),
        ("mean tokens", f"{data.mean_prompt:,.0f} of a prompt, {data.mean_answer:,.0f} of an answer"),
        ("steps", f"{report.num_steps:,}"),
        ("speed", f"{report.tflops:,.3g} TFLOP/s, {report.tflops_source}; link {report.link_gbs:g} GB/s"),
    ]
    return card(
        f"Plan of {report.model} for {report.device}",
        facts(rows),
        table(("precompute", "device", "host", "time", "fits"), [*map(_scoring_row, report.precompute)]),
        table(
            ("train", "memory", "tokens at once", "device", "host", "a step", "time", "fits"),
            [*map(_training_row, report.train)],
        ),
        folded("commands", *(note(way.command) for way in ways if way.fits)),
        folded("assumptions", *map(note, report.assumptions)) if report.assumptions else "",
        remarks(report.remarks),
    )


def _scoring_row(way: PlannedScoring) -> list[str]:
    streamed = ", streamed" if way.is_streamed else ""
    return [f"{way.reference}{streamed}", *_cost(way), ", ".join(way.fits) or "none"]


def _training_row(way: PlannedTraining) -> list[str]:
    memory = way.place if way.memory == "place" else way.memory
    again = f", {way.gradient_checkpointing}" if way.gradient_checkpointing else ""
    device, host, seconds = _cost(way)
    step = "-" if way.step_seconds is None else f"{way.step_seconds:,.2f} s"
    fits = ", ".join(way.fits) or "none"
    return [way.method, f"{memory}{again}", f"{way.budget_tokens:,}", device, host, step, seconds, fits]


def _cost(way: PlannedScoring | PlannedTraining) -> tuple[str, str, str]:
    seconds = "-" if way.seconds is None else format_seconds(way.seconds)
    return shown_bytes(way.device_bytes), shown_bytes(way.host_bytes), seconds
