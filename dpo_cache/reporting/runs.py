"""Runs -> tables and plots: what the folders of runs say of them, side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.losses.table import LOSSES
from dpo_cache.options.sweep import shown_value

Line = dict[str, Any]  # of metrics.jsonl
LAST_STEPS = 10
ACCURACY = "eval/rewards/accuracies"


@dataclass(frozen=True)
class RunRow:
    """A run in the table. Losses and rewards are of the held-out pairs, or where there are none of the last
    training steps.
    """

    name: str
    options: dict[str, Any]  # those that vary between the runs
    state: str  # finished, running, stopped, failed or waiting
    num_steps: int
    total_steps: int | None  # None before a run has begun
    measured_on: str | None  # "held out", "training", or None before anything was measured
    accuracy_before: float | None  # held out alone
    accuracy: float | None
    margin: float | None
    mean_loss: float | None
    chosen_reward: float | None
    rejected_reward: float | None
    pairs_per_s: float | None
    peak_bytes: int | None
    steps_s: float | None  # of the training steps: without loading, evaluating and saving
    error: str | None = None


def read_lines(run: Path) -> list[Line]:
    """The whole lines of a run's metrics.jsonl; none where there is no such file."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")  # the last is empty, or being written
    return [json.loads(line) for line in whole]


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json; nothing of one that has not begun."""
    try:
        return json.loads((run / "config.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
        return {}


def read_resolved(run: Path) -> dict[str, Any]:
    """What became of the defaults of a run; nothing of one that has not begun."""
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
    """The row of a run, from its folder and, where it ended, from its report, which tells the evaluation of
    the policy that was saved.
    """
    lines = read_lines(run)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    last = _evaluation_of_policy(run, evaluations, report) if evaluations else _mean_of_last(steps)
    prefix = "eval/" if evaluations else ""
    steps_s = sum(line["num_pairs"] / line["pairs_per_s"] for line in steps)
    return RunRow(
        name=name,
        options=options,
        state=state,
        num_steps=steps[-1]["step"] if steps else 0,
        total_steps=read_resolved(run).get("total_steps"),
        measured_on="held out" if evaluations else "training" if steps else None,
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
    )


def sort_rows(rows: Sequence[RunRow]) -> list[RunRow]:
    """Finished runs with held-out pairs by their accuracy, the best first; the others after them as they
    came.
    """

    def rank(row: RunRow) -> float:
        is_ranked = row.state == "finished" and row.measured_on == "held out" and row.accuracy is not None
        return -row.accuracy if is_ranked and row.accuracy is not None else 1.0

    return sorted(rows, key=rank)


def table_cells(rows: Sequence[RunRow]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, to be shown: what varies, then what came of it. Beside held-out pairs, values of
    training pairs are left out.
    """
    varied = list(rows[0].options)
    held_out = any(row.measured_on == "held out" for row in rows)
    titles = [
        *varied,
        "steps",
        "before",
        "accuracy",
        "margin",
        "mean loss",
        "chosen",
        "rejected",
        "pairs/s",
        "peak GB",
        "time s",
        "state",
    ]
    return titles, [
        [
            *(shown_value(row.options[name]) for name in varied),
            *_measured_cells(row, shows=not held_out or row.measured_on == "held out"),
        ]
        for row in rows
    ]


def table_notes(rows: Sequence[RunRow], objective: set[str]) -> list[str]:
    """What a reader of the table must know; `objective` names the options that change what a loss is."""
    held_out = any(row.measured_on == "held out" for row in rows)
    notes = []
    if held_out:
        notes.append(
            "accuracy, margin, mean loss and rewards: of the held-out pairs after training, accuracy "
            "before it beside; sorted by accuracy."
        )
    else:
        notes.append(
            "No pairs were held out (`eval_pairs`, `eval_fraction`): accuracy, margin, mean loss and "
            f"rewards are means of the last {LAST_STEPS} "
            "training steps, each before its update; in the order of the grid."
        )
    if differing := [name for name in rows[0].options if name in objective]:
        without = [name for name, loss in LOSSES.items() if loss.prefers and not loss.has_reference]
        notes.append(
            f"{', '.join(differing)}: runs that differ in these measure mean loss, margin and rewards in "
            "other units. Compare those only among equal ones, and runs with each other by accuracy. "
            f"({', '.join(without[:-1])} and {without[-1]} count it by rewards without the reference.)"
        )
    notes.append("time s: of the training steps, without loading, evaluating and saving.")
    return notes


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
    """The table with every digit, one column a field of `RunRow`; the options that vary have theirs after the
    name.
    """
    varied = list(rows[0].options)
    measured = [name for name in asdict(rows[0]) if name not in ("name", "options")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *varied, *measured])
    for row in rows:
        writer.writerow(
            [
                row.name,
                *(shown_value(row.options[name]) for name in varied),
                *(getattr(row, name) for name in measured),
            ]
        )
    return text.getvalue()


def check_plot(path: Path) -> None:
    """Raise `OptionError` before anything runs whose plot could not be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "`plot` needs matplotlib.\nInstall it with `pip install 'dpo-cache[plot]'`, or leave `plot` out."
        ) from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise OptionError(f"`plot` {path}: expected a file that ends in .svg, .png or .pdf.")
    if not path.absolute().parent.is_dir():
        raise OptionError(
            f"`plot` {path}: there is no folder {path.parent}.\nMake it, or choose another file."
        )


def plot_accuracy(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Held-out accuracy over steps, one line a run (its label and folder); runs without an evaluation have
    none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    place = figure.subplots()
    for number, (label, run) in enumerate(runs):
        evaluations = [line for line in read_lines(run) if ACCURACY in line]
        style = ("-", "--", ":")[number // 10 % 3]
        place.plot(
            [line["step"] for line in evaluations],
            [line[ACCURACY] for line in evaluations],
            style,
            marker=".",
            label=label,
        )
    place.set(xlabel="step", ylabel="held-out accuracy")
    place.grid(alpha=0.3)
    place.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path)


def _evaluation_of_policy(run: Path, evaluations: Sequence[Line], report: dict[str, Any] | None) -> Line:
    """The evaluation after training of the policy that was saved: the last one, or under `patience` one
    before.
    """
    if report and report["finished"]:
        return report["eval_after"] or {}
    # killed before its report: which one was saved is not known
    if evaluations[-1]["step"] == 0 or read_config(run).get("patience"):
        return {}
    return evaluations[-1]


def _mean_of_last(steps: Sequence[Line]) -> Line:
    """Means over the last training steps; nothing where there are none."""
    last = steps[-LAST_STEPS:]
    return (
        {
            name: sum(line[name] for line in last) / len(last)
            for name in last[-1]
            if all(name in line for line in last)
        }
        if last
        else {}
    )


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
