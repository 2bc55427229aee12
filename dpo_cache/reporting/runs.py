"""Compares runs: their folders -> tables and plots."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.losses.table import LOSSES
from dpo_cache.options.run_config import evaluation_name
from dpo_cache.options.sweep import shown_value
from dpo_cache.packages import check_matplotlib
from dpo_cache.reporting.ranking import describe_best

Line = dict[str, Any]  # a line of metrics.jsonl
LAST_STEPS = 10
ACCURACY = "eval/rewards/accuracies"
TITLES = (
    "steps", "before", "accuracy", "margin", "mean loss", "chosen", "rejected", "pairs/s", "peak GB",
    "time s", "state",
)  # fmt: skip
SHORT_TITLES = ("steps", "accuracy", "margin", "mean loss", "time s", "state")


@dataclass(frozen=True)
class RunRow:
    """A run in the table. Losses and rewards are those of the evaluation pairs or, without any, of the last
    training steps. An accuracy is None if margins are rounding noise.
    """

    name: str
    options: dict[str, Any]  # the options that vary between the runs
    state: str  # finished, running, stopped, failed or waiting
    num_steps: int
    total_steps: int | None  # None before the run has started
    # "held out"; "evaluation" if their prompts are trained on; "training"; None before any measurement
    measured_on: str | None
    accuracy_before: float | None  # before training; only on evaluation pairs
    accuracy: float | None
    margin: float | None
    mean_loss: float | None
    chosen_reward: float | None
    rejected_reward: float | None
    pairs_per_s: float | None
    peak_bytes: int | None
    steps_s: float | None  # seconds of the training steps, without loading, evaluating and saving
    error: str | None = None
    num_eval_pairs: int | None = None

    @property
    def is_evaluated(self) -> bool:
        """Return whether the run has evaluation pairs, held out or not."""
        return self.measured_on not in (None, "training")


def read_lines(run: Path) -> list[Line]:
    """The complete lines of a run's metrics.jsonl; none if there is no such file."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")  # the last one is empty, or is being written
    return [entry for entry in map(_parsed, whole) if entry]


def _parsed(line: bytes) -> Line | None:
    try:
        entry = json.loads(line)
    except ValueError:  # damaged: the run logs that when it is resumed
        return None
    return entry if isinstance(entry, dict) and "step" in entry else None


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json; empty for a run that has not started."""
    try:
        return json.loads((run / "config.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):  # not written yet, or being written
        return {}


def read_resolved(run: Path) -> dict[str, Any]:
    """The resolved defaults of a run; empty for a run that has not started."""
    return read_config(run).get("resolved", {})


def read_row(
    run: Path,
    *,
    name: str,
    options: dict[str, Any],
    state: str,
    report: dict[str, Any] | None = None,
    error: str | None = None,
) -> RunRow:
    """The row of a run, from its folder and, if it has ended, its report, which has the evaluation of the
    saved policy.
    """
    lines = read_lines(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    last = _evaluation_of_policy(run, evaluations, report) if evaluations else _mean_of_last(steps)
    prefix = "eval/" if evaluations else ""
    steps_s = sum(line["num_pairs"] / line["pairs_per_s"] for line in steps)
    config = read_config(run)
    return RunRow(
        name=name,
        options=options,
        state=state,
        num_steps=steps[-1]["step"] if steps else 0,
        total_steps=config.get("resolved", {}).get("total_steps"),
        measured_on=evaluation_name(config) if evaluations else "training" if steps else None,
        accuracy_before=evaluations[0][ACCURACY] if evaluations and evaluations[0]["step"] == 0 else None,
        accuracy=last.get(f"{prefix}rewards/accuracies"),
        margin=last.get(f"{prefix}rewards/margins"),
        mean_loss=last.get(f"{prefix}loss"),
        chosen_reward=last.get(f"{prefix}rewards/chosen"),
        rejected_reward=last.get(f"{prefix}rewards/rejected"),
        pairs_per_s=sum(line["num_pairs"] for line in steps) / steps_s if steps else None,
        peak_bytes=max((line["peak_bytes"] for line in steps), default=None),
        steps_s=steps_s if steps else None,
        error=error,
        num_eval_pairs=last.get("eval/num_pairs"),
    )


def table_cells(rows: Sequence[RunRow], *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table: the varied options, then the results, or the most important of them. If
    any run has evaluation pairs, values of training pairs are left out.
    """
    shown = [index for index, title in enumerate(TITLES) if not short or title in SHORT_TITLES]
    shows_training = not _has_evaluations(rows)
    cells = []
    for row in rows:
        measured = _measured_cells(row, shows=shows_training or row.is_evaluated)
        cells.append([*map(shown_value, row.options.values()), *(measured[index] for index in shown)])
    return [*rows[0].options, *(TITLES[index] for index in shown)], cells


def table_notes(rows: Sequence[RunRow], objective: set[str]) -> list[str]:
    """Notes below the table, the one on the best run first; `objective` names the options that change the
    unit of a loss.
    """
    notes = [best] if (best := describe_best(rows)) else []
    if not _has_evaluations(rows):
        notes.append(
            "No pairs were held out (`eval_pairs`, `eval_fraction`): accuracy, margin, mean loss and rewards "
            f"are means of the last {LAST_STEPS} training steps, each before its update; in the order of the "
            "grid."
        )
    if differing := [name for name in rows[0].options if name in objective]:
        without = [name for name, loss in LOSSES.items() if loss.prefers and not loss.has_reference]
        other = (
            f" ({', '.join(without[:-1])} and {without[-1]} compute it from rewards without the reference.)"
        )
        notes.append(
            f"Mean loss, margin and rewards depend on {' and '.join(differing)}. Compare them only between "
            f"runs with the same {' and '.join(differing)}, and other runs by accuracy."
            f"{other if 'loss' in differing else ''}"
        )
    return [*notes, *column_notes(rows)]


def column_notes(rows: Sequence[RunRow]) -> list[str]:
    """The meaning of the columns."""
    time = "time s is that of the training steps, without loading, evaluating and saving."
    if not _has_evaluations(rows):
        return [time]
    is_held_out = all(row.measured_on == "held out" for row in rows if row.is_evaluated)
    pairs = "held-out pairs" if is_held_out else "evaluation pairs, some of whose prompts are trained on,"
    return [
        f"accuracy, margin, mean loss, chosen and rejected (rewards) are those of the {pairs} after "
        "training, before is the accuracy before it; an accuracy is - where margins are rounding noise. The "
        "best run is first.",
        time,
    ]


def table_markdown(title: str, rows: Sequence[RunRow], notes: Sequence[str]) -> str:
    """The table as a page of Markdown."""
    titles, cells = table_cells(rows)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [titles, *cells]]
    lines.insert(1, "|" + "---|" * len(titles))
    failures = [f"- {row.name} failed: {row.error}" for row in rows if row.error]
    return (
        "\n".join([f"# {title}", "", *lines, "", *failures, *([""] if failures else []), "\n\n".join(notes)])
        + "\n"
    )


def table_csv(rows: Sequence[RunRow]) -> str:
    """The table with every digit, one column for each field of `RunRow`; the varied options have theirs after
    the name.
    """
    text = io.StringIO()
    measured = [entry.name for entry in fields(RunRow) if entry.name not in ("name", "options")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *rows[0].options, *measured])
    for row in rows:
        values = (getattr(row, name) for name in measured)
        writer.writerow([row.name, *map(shown_value, row.options.values()), *values])
    return text.getvalue()


def _has_evaluations(rows: Sequence[RunRow]) -> bool:
    return any(row.is_evaluated for row in rows)


def check_plot(path: Path) -> None:
    """Raise `OptionError` if a plot cannot be drawn into the file."""
    check_matplotlib()
    from matplotlib.figure import Figure

    if path.suffix[1:] not in Figure().canvas.get_supported_filetypes():
        raise OptionError(f"`plot` {path}: expected a file that ends in .svg, .png or .pdf.")
    if not path.absolute().parent.is_dir():
        raise OptionError(
            f"`plot` {path}: there is no folder {path.parent}.\nMake it, or choose another file."
        )


def plot_accuracy(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Plot the accuracy of evaluations over steps, one line for each run (its label and folder) with some."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, run) in enumerate(runs):
        evaluations = [line for line in read_lines(run) if ACCURACY in line]
        steps = [line["step"] for line in evaluations]
        accuracies = [math.nan if line[ACCURACY] is None else line[ACCURACY] for line in evaluations]
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(steps, accuracies, style, marker=".", label=label)
    axes.set(xlabel="step", ylabel="accuracy on evaluation pairs")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path)


def _evaluation_of_policy(run: Path, evaluations: Sequence[Line], report: dict[str, Any] | None) -> Line:
    """The evaluation of the saved policy after training: the last or, under `patience`, an earlier one."""
    if report and report["finished"]:
        return report["eval_after"] or {}
    # killed before its report: the saved policy is unknown
    if evaluations[-1]["step"] == 0 or read_config(run).get("patience"):
        return {}
    return evaluations[-1]


def _mean_of_last(steps: Sequence[Line]) -> Line:
    """Means over the last training steps; empty without any."""
    last = steps[-LAST_STEPS:]
    names = [name for name in steps[-1] if all(name in line for line in last)] if steps else []
    return {name: _mean([line[name] for line in last]) for name in names}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; an unknown accuracy counts one half, as ties do, unless all are unknown."""
    if all(value is None for value in values):
        return None
    return sum(0.5 if value is None else value for value in values) / len(values)


def _measured_cells(row: RunRow, *, shows: bool) -> list[str]:
    measured = (
        (row.accuracy_before, "{:.1%}"),
        (row.accuracy, "{:.1%}"),
        (row.margin, "{:+.4f}"),
        (row.mean_loss, "{:.4f}"),
        (row.chosen_reward, "{:+.4f}"),
        (row.rejected_reward, "{:+.4f}"),
    )
    return [
        f"{row.num_steps}/{'?' if row.total_steps is None else row.total_steps}",
        *(_number(value if shows else None, form) for value, form in measured),
        _number(row.pairs_per_s, "{:.2f}"),
        _number(row.peak_bytes and row.peak_bytes / 1e9, "{:.2f}"),
        _number(row.steps_s, "{:.1f}"),
        row.state,
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
