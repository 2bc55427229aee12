"""`dpo-cache sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cache.cli.output import (
    ProgressLine,
    command_line,
    format_seconds,
    is_verbose,
    print_columns,
    print_json,
    print_text,
    when_stopped,
    with_flags,
)
from dpo_cache.cli.parameters import command
from dpo_cache.cli.signals import StoppedEarly, StopRequest
from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.options.base import flag_of
from dpo_cache.options.sweep import SweepOptions, swept_fields, type_of
from dpo_cache.progress import format_share, show_sweep

if TYPE_CHECKING:
    from dpo_cache.sweeping import SweepReport


def _with_plan(given: dict[str, Any]) -> dict[str, Any]:
    from dpo_cache.sweeping.sweep_folder import with_plan

    return with_plan(given)


@command(SweepOptions, complete=_with_plan)
def sweep_command(options: SweepOptions, as_json: bool) -> None:
    r"""Train once for each combination of the options' values, from one cache, and compare the runs.

    Every option of `train` takes several values, with commas between them. A comma that belongs to a
    value is written \, and the parts of a weighted sum are joined with +, as in
    --loss sigmoid:0.8+sft:0.2,ipo. Options with one value are the same in all runs.

    The same command again, or --resume SWEEP, continues: finished runs stay, stopped ones are resumed,
    failed ones are tried again; with more values, runs are added. Ctrl-C finishes the step of each active
    run and saves it. The exit code is 1 if a run did not finish.
    """
    from dpo_cache.sweeping import sweep

    _refuse_repeated(options)
    resume = command_line("sweep", "--resume", options.output)
    when_stopped(f"runs keep the state that they have saved. Next: {resume}")
    with ProgressLine("sweep") as line, StopRequest(line.remark) as request:
        report = sweep(
            **asdict(options),
            on_progress=lambda progress: show_sweep(line, progress),
            on_run=lambda report: line.remark(_ended(report)),
            log=line.remark,
            should_stop=lambda: request.is_asked,
        )
    if as_json:
        print_json({**asdict(report), "finished": report.finished})
    else:
        _print_report(report)
    if request.exit_code is not None and not report.finished:
        raise StoppedEarly(request.exit_code)
    if not report.finished:
        unfinished = report.num_runs - report.num_finished
        raise TrainingError(
            f"{unfinished} of {report.num_runs} runs did not finish.\n"
            f"Next: {command_line('sweep', '--resume', report.output)}"
        )


def _refuse_repeated(options: SweepOptions) -> None:
    """Raise `OptionError` for a repeated --loss: a weighted sum in `train`, but two runs here."""
    for entry in swept_fields():
        given = [value for value in getattr(options, entry.name) if isinstance(value, str)]
        if type_of(entry) is tuple and len(given) > 1:
            flag = flag_of(entry)
            raise OptionError(
                f"{flag} is given {len(given)} times.\n"
                f"Join the parts of one value with +, and values with commas: {flag} a+b,c."
            )


def _ended(report: SweepReport) -> str:
    """One line about the run that has ended."""
    row = next(row for row in report.rows if row.name == report.ended)
    shown = [] if row.mean_loss is None else [f"loss {row.mean_loss:.4f}"]
    if row.margin is not None:
        shown += [f"accuracy {format_share(row.accuracy)}", f"margin {row.margin:+.4f}"]
    measured = f"{row.measured_on}: {', '.join(shown)}; " if shown else ""
    time = "" if row.steps_s is None else f" in {format_seconds(row.steps_s)}"
    done = f"{report.num_finished} of {report.num_runs} runs finished"
    steps = f"{row.num_steps} step{'' if row.num_steps == 1 else 's'}"
    return f"{row.name} {row.state}: {measured}{steps}{time}; {done}."


def _print_report(report: SweepReport) -> None:
    from dpo_cache.reporting.runs import column_notes, read_resolved, table_cells

    print_text(
        f"{report.output}: {report.num_finished} of {report.num_runs} runs finished, in "
        f"{format_seconds(report.elapsed_s)}"
    )
    print_columns(*table_cells(report.rows, short=not is_verbose()))
    explained = [] if is_verbose() else column_notes(report.rows)
    for note in report.notes:
        if note not in explained:
            print_text(with_flags(note))
    for row in report.rows:
        if row.error:
            print_text(f"{row.name} failed: {row.error}")
    print_text(
        f"The table is in {report.table} and .csv, each run in a folder of its name in {report.output}."
    )
    if not report.finished:
        print_text(f"Next: {command_line('sweep', '--resume', report.output)}")
    elif report.best:
        run = Path(report.output, report.best[0])
        kind = read_resolved(run).get("auto_class", "AutoModelForCausalLM")
        which = "the best" if len(report.best) == 1 else "the first of the best"
        print_text(f'Next, with {which}: {kind}.from_pretrained("{run}/model")')
