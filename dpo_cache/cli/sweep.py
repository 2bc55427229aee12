"""`dpo-cache sweep`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from dpo_cache.cli.output import ProgressLine, format_columns, format_seconds, print_json
from dpo_cache.cli.parameters import command
from dpo_cache.cli.signals import StoppedEarly, StopRequest
from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.options.base import flag_of
from dpo_cache.options.sweep import SweepOptions, swept_fields, type_of
from dpo_cache.progress import show_sweep

if TYPE_CHECKING:
    from dpo_cache.sweeping import SweepReport


@command(SweepOptions, json_help="Print the report as JSON.")
def sweep_command(options: SweepOptions, as_json: bool) -> None:
    r"""Train once for each combination of the options' values, from one cache, and compare the runs.

    Every option of `train` takes several values, with commas between them. A comma that belongs to a
    value is written \, and the parts of a weighted sum are joined with +, as in
    --loss sigmoid:0.8+sft:0.2,ipo. What has one value is shared by all runs.

    The same command again goes on: finished runs stay, stopped ones are resumed, failed ones tried
    again; with more values, runs are added. Ctrl-C finishes the step of each run at work and saves it.
    Exits with 1 where a run did not finish.
    """
    from dpo_cache.sweeping import sweep

    _refuse_repeated(options)
    with ProgressLine("sweep") as line, StopRequest(line.remark) as request:

        def show_table(report: SweepReport) -> None:
            line.remark(_table(report))

        report = sweep(
            **asdict(options),
            on_progress=lambda progress: show_sweep(line, progress),
            on_run=show_table,
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
            "The same command again goes on with them."
        )


def _refuse_repeated(options: SweepOptions) -> None:
    """`train` makes a weighted sum of a repeated --loss; here that would be two runs, without a word."""
    for entry in swept_fields():
        given = getattr(options, entry.name)
        if type_of(entry) is tuple and len(given) > 1:
            flag = flag_of(entry)
            raise OptionError(
                f"{flag} is given {len(given)} times.\n"
                f"Join the parts of one value with +, and values with commas: {flag} a+b,c."
            )


def _table(report: SweepReport) -> str:
    from dpo_cache.reporting.runs import table_cells

    return "\n".join(format_columns(*table_cells(report.rows)))


def _print_report(report: SweepReport) -> None:
    print(
        f"{report.output}: {report.num_finished} of {report.num_runs} runs finished, in "
        f"{format_seconds(report.elapsed_s)}"
    )
    print(_table(report))
    for note in report.notes:
        print(note)
    for row in report.rows:
        if row.error:
            print(f"{row.name} failed: {row.error}")
    print(f"The table is in {report.table} and .csv, each run in a folder of its name in {report.output}.")
    if not report.finished:
        print("Next: the same command again.")
    elif report.rows[0].measured_on == "held out":
        print(
            "Next, with the best: "
            f'AutoModelForCausalLM.from_pretrained("{report.output}/{report.rows[0].name}/model")'
        )
