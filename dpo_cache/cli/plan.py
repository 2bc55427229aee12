"""`dpo-cache plan`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from dpo_cache.cli.output import (
    ProgressLine,
    count,
    format_bytes,
    format_seconds,
    is_verbose,
    print_columns,
    print_json,
    print_table,
    print_text,
    with_flags,
)
from dpo_cache.cli.parameters import command
from dpo_cache.log import phase
from dpo_cache.options.plan import PlanOptions

if TYPE_CHECKING:
    from dpo_cache.planning.parts import Parts
    from dpo_cache.planning.report import PlannedScoring, PlannedTraining, PlanReport

DETAILS = ("tokens at once", "live reference", "step", "checkpoint")  # columns that only --verbose shows


@command(PlanOptions)
def plan_command(options: PlanOptions, as_json: bool) -> None:
    """Predict what fits: memory of GPU and host, time and disk, of precompute and train.

    No weights are read, and no GPU is needed: the package's own passes run on tensors without values. Each
    way to train is compared with DPO with a live reference, with every layer's activations recomputed.
    """
    from dpo_cache.planning.start import check_plan

    check_plan(options)
    with ProgressLine("planning") as line:
        with phase("importing libraries"):
            from dpo_cache.planning.plan import plan

        with phase("counting memory and time"):
            report = plan(**asdict(options), log=line.remark)
    if as_json:
        print_json(asdict(report))
        return
    _print_head(report)
    _print_scoring(report)
    _print_training(report)
    if is_verbose():
        _print_parts(report)
        _print_transfers(report)
    _print_commands(report)
    for text in report.assumptions if is_verbose() else ():
        print_text(f"Assumed: {with_flags(text)}.")
    if not any(way.fits for way in report.train):
        smallest = min(way.device_bytes for way in report.train)
        print_text(f"No way to train fits: the smallest needs {format_bytes(smallest)} of device memory.")
    if not is_verbose():
        print_text("--verbose adds memory by part, bytes over the link, every command, and what is assumed.")
    print_text("Nothing was written. Next: one of the commands above, `train` with --dry-run first.")


def _print_head(report: PlanReport) -> None:
    data = report.data
    rows = [
        ("parameters", count(report.num_parameters)),
        ("data", data.source),
        ("pairs", count(data.num_pairs)),
        ("tokens of a prompt, an answer", f"{data.mean_prompt:,.0f}, {data.mean_answer:,.0f} on average"),
        ("longest prompt and answer", f"{data.longest:,} tokens"),
        ("tokens", f"{count(data.data_tokens)}; {count(data.forest_tokens)} with shared prefixes once"),
        ("steps", count(report.num_steps)),
        ("speed", f"{report.tflops:,.3g} TFLOP/s, {report.tflops_source}; link {report.link_gbs:g} GB/s"),
        ("disk, cache", format_bytes(report.cache_bytes)),
    ]
    print_table(f"{report.model}: a plan for {report.device}", rows)


def _print_scoring(report: PlanReport) -> None:
    print_text("\nprecompute")
    rows = [
        {
            "reference": _reference(way),
            "tokens at once": count(way.budget_tokens),
            "device": format_bytes(way.device_bytes),
            "host": format_bytes(way.host_bytes),
            "time": format_seconds(way.seconds or 0.0),
            "fits": _cards(report, way),
        }
        for way in report.precompute
    ]
    _print_ways(rows)


def _print_training(report: PlanReport) -> None:
    print_text("\ntrain, from the fastest down")
    rows = [
        {
            "method": way.method,
            "memory": _name(way),
            "tokens at once": count(way.budget_tokens),
            "device": format_bytes(way.device_bytes),
            "host": format_bytes(way.host_bytes),
            "live reference": ""
            if way.live_reference_bytes is None
            else format_bytes(way.live_reference_bytes),
            "step": f"{way.step_seconds or 0.0:,.2f} s",
            "time": format_seconds(way.seconds or 0.0),
            "checkpoint": format_bytes(way.checkpoint_bytes),
            "fits": _cards(report, way),
        }
        for way in report.train
    ]
    _print_ways(rows)


def _print_ways(rows: list[dict[str, str]]) -> None:
    """A table of ways to run; without --verbose it has no column of `DETAILS`."""
    titles = [title for title in rows[0] if is_verbose() or title not in DETAILS]
    print_columns(titles, [[row[title] for title in titles] for row in rows])


def _print_parts(report: PlanReport) -> None:
    print_text("\nprecompute, on the device by part")
    scored = [(_reference(way), *_sizes(way.device)) for way in report.precompute]
    print_columns(("reference", *asdict(report.precompute[0].device)), scored)
    for name in ("device", "host"):
        found = [(way, getattr(way, name)) for way in report.train]
        rows = [
            (way.method, _name(way), *_sizes(parts)) for way, parts in found if any(asdict(parts).values())
        ]
        if rows:
            print_text(f"\ntrain, on the {name} by part")
            print_columns(("method", "memory", *asdict(found[0][1])), rows)


def _print_transfers(report: PlanReport) -> None:
    found = [(way, way.transfers) for way in report.train if way.transfers is not None]
    if not found:
        return
    print_text("\nbytes of a step over the link, and the tokens of a step from which computing hides them")
    rows = [
        (
            way.method,
            _name(way),
            *map(format_bytes, (one.up, one.down, one.update_up, one.update_down)),
            *("never" if tokens is None else count(tokens) for tokens in one.hidden_from_tokens.values()),
        )
        for way, one in found
    ]
    titles = ("method", "memory", "to the device", "to the host", "update, there", "update, back")
    print_columns((*titles, *(f"hidden on {name}" for name in found[0][1].hidden_from_tokens)), rows)


def _print_commands(report: PlanReport) -> None:
    print_text("\ncommands")
    for one in report.precompute:
        print_text(f"  {one.command}")
    fastest: set[str] = set()  # methods
    for way in report.train:
        if way.fits and (is_verbose() or way.method not in fastest):
            fastest.add(way.method)
            print_text(f"  {way.command}")
    print_text()


def _reference(way: PlannedScoring) -> str:
    return way.reference + (", streamed" if way.is_streamed else "")


def _name(way: PlannedTraining) -> str:
    """The preset or the placement, and the recomputed activations."""
    name = way.place if way.memory == "place" else way.memory
    return name if way.gradient_checkpointing is None else f"{name}, {way.gradient_checkpointing}"


def _cards(report: PlanReport, way: PlannedScoring | PlannedTraining) -> str:
    """The cards that fit: `from 16GiB` if all larger cards also fit."""
    fitting = [card for card in report.cards if card in way.fits]
    if len(fitting) > 1 and fitting == report.cards[-len(fitting) :]:
        return f"from {fitting[0]}"
    return ", ".join(fitting) or "none"


def _sizes(parts: Parts) -> Iterable[str]:
    return (format_bytes(size) if size else "" for size in asdict(parts).values())
