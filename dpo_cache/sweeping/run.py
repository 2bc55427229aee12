"""One cache, several runs: each combination of the options' values is trained in its own process, and one
table compares all runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.files.atomic import refused_writes
from dpo_cache.files.claim import Claim
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.options.base import with_new_names
from dpo_cache.options.keywords import keywords_of
from dpo_cache.options.sweep import SweepOptions, loss_settings
from dpo_cache.options.train import TrainOptions
from dpo_cache.planning.start import TRAIN_INPUTS, check_train
from dpo_cache.progress import show_sweep, shows_progress
from dpo_cache.reporting.ranking import best_rows, sort_rows
from dpo_cache.reporting.runs import (
    RunRow,
    check_plot,
    plot_accuracy,
    read_resolved,
    read_row,
    table_csv,
    table_markdown,
    table_notes,
)
from dpo_cache.sweeping.grid import Grid, read_grid
from dpo_cache.sweeping.html import sweep_html
from dpo_cache.sweeping.processes import ENDS_BY_SIGNAL, ActiveRun, run_environment, threads_of_a_run
from dpo_cache.sweeping.sweep_folder import Run, hold_folder, plan_runs, read_report, with_plan, write_whole
from dpo_cache.training.launch import launched_rank
from dpo_cache.training.output.run_start import clear_finished
from dpo_cache.training.output.tracker_access import check_trackers

POLL_S = 0.2
# Options whose values are checked with the model's config and torch, unless they have their defaults
USUAL = {
    "lora_targets": "all-linear",
    "peft_config": None,
    "merge_adapter": False,
    "router_aux_loss_coef": None,
    "device": "auto",
}

OnRow = Callable[["SweepReport"], None]


@dataclass(frozen=True)
class SweepProgress:
    """The progress of a sweep: the finished runs, and the last step of each active run."""

    num_done: int
    num_runs: int
    # name, total steps, last line of metrics.jsonl
    active: list[tuple[str, int | None, dict[str, Any] | None]]
    done: float  # number of runs, with the finished share of active ones
    seconds_left: float | None  # None before the first step


@dataclass(frozen=True)
class SweepReport:
    """The result of `sweep`, or its state after a run."""

    output: str
    num_runs: int
    num_finished: int
    num_failed: int
    rows: list[RunRow]  # in the order of the table
    notes: list[str]
    table: str
    elapsed_s: float
    # names of the finished runs with the highest accuracy on evaluation pairs; several if they tie
    best: list[str] = field(default_factory=list)
    ended: str | None = None  # the run that has ended, in a report to `on_run`
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<SweepReport of {self.output}: {self.num_finished:,} of {self.num_runs:,} runs finished, "
            f"{self.num_failed:,} failed>"
        )

    def _repr_html_(self) -> str:
        return sweep_html(self)

    @property
    def finished(self) -> bool:
        return self.num_finished == self.num_runs


@keywords_of(SweepOptions)
@shows_progress("sweep", show_sweep)
@keeps_remarks
def sweep(
    cache: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    jobs: int = 1,
    resume: bool | str | os.PathLike[str] = False,
    plot: str | os.PathLike[str] | None = None,
    on_progress: Callable[[SweepProgress], None] | None = None,
    on_run: OnRow | None = None,
    log: Log | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> SweepReport:
    """Train once for each combination of the options' values, `jobs` at once, and compare the runs.

    Keyword arguments are the options of `train`; a list holds several values, as in
    `beta=[0.05, 0.1], loss=["sigmoid", "ipo"]`, and a string may hold several between commas. Called again
    with the same values, or with more of them, finished runs are left as they are, stopped ones are resumed,
    and failed ones are tried again; `resume=SWEEP` reads cache and values from that folder's sweep.json. A
    run that fails does not end the others.

    `progress=True` shows on stderr what the command line shows. `on_progress` is called a few times a second,
    `on_run` with a report when a run has ended, `log` gets each remark (default: the logger `dpo_cache`); the
    report lists them, too. When `should_stop` returns True, active runs finish their step and save, and no
    other starts.

    Raises `DpoCacheError` before anything runs: combinations that make no sense, a folder of something else,
    a missing pair set.
    """
    log = log or log_remark
    if launched := launched_rank():
        raise OptionError(
            f"a launcher has started {launched.size} processes, and each run of a sweep trains in one.\n"
            "Start the sweep without a launcher; `jobs` runs several at once."
        )
    given = {"jobs": jobs, "resume": resume, "plot": plot, **options}
    given |= {name: value for name, value in (("cache", cache), ("output", output)) if value is not None}
    chosen = SweepOptions(**with_plan(with_new_names(SweepOptions, given, log)))
    grid = read_grid(chosen)
    if chosen.plot:
        _check_plot(Path(chosen.plot), grid)
    _check_runs(chosen, grid)
    with hold_folder(Path(chosen.output), log) as claim:
        runs = plan_runs(Path(chosen.output), chosen.cache, grid, resume=bool(chosen.resume))
        work = _Sweep(chosen, runs, claim, on_progress or (lambda _: None), on_run or (lambda _: None), log)
        return work.run(should_stop or (lambda: False))


class _Sweep:
    """The runs of a sweep: the waiting ones, the active ones, and the errors of failed ones."""

    def __init__(
        self,
        options: SweepOptions,
        runs: list[Run],
        claim: Claim,
        on_progress: Callable[[SweepProgress], None],
        on_run: OnRow,
        log: Log,
    ):
        self.options, self.runs, self.claim = options, runs, claim
        self.on_progress, self.on_run, self.log = on_progress, on_run, log
        self.started = time.monotonic()
        self.output = Path(options.output)
        self.waiting = [run for run in runs if not run.is_finished]
        self.active: list[ActiveRun] = []
        self.errors: dict[str, str] = {}
        self.logged: set[str] = set()  # lines that runs have logged
        self.seconds_of_runs: list[float] = []  # durations of whole runs that have ended

    def run(self, should_stop: Callable[[], bool]) -> SweepReport:
        """Start and watch every waiting run, then write the table."""
        self._log_plan()
        self._clear_finished()
        stopping = False
        try:
            while self.active or (self.waiting and not stopping):
                if should_stop() and not stopping:
                    stopping = True
                    self._stop()
                while self.waiting and not stopping and len(self.active) < self.options.jobs:
                    self._start(self.waiting.pop(0))
                for active in [*self.active]:
                    if (code := active.poll(self._log_line)) is not None:
                        self._end(active, code, stopping=stopping)
                self.on_progress(self._progress())
                time.sleep(POLL_S)
                self.claim.check()
        except BaseException:  # also Ctrl-C: no run continues without its sweep
            self._stop()
            self._wait()
            raise
        return self._report()

    def _clear_finished(self) -> None:
        """Remove the leftover files of finished runs that were killed before they removed them."""
        for run in self.runs:
            if run.is_finished and (removed := clear_finished(run.folder, self.log)):
                self.log(f"{run.name}: it was killed during its clean-up; {', '.join(removed)} removed.")

    def _start(self, run: Run) -> None:
        slot = min(set(range(self.options.jobs)) - {active.slot for active in self.active})
        environment = run_environment(self.options.jobs, slot)
        descriptor = self.claim.descriptor
        self.active.append(ActiveRun(self.options.cache, run, slot, environment, descriptor))

    def _end(self, active: ActiveRun, code: int, *, stopping: bool) -> None:
        run = active.run
        if (seconds := active.seconds_in_all) is not None and run.is_finished:
            self.seconds_of_runs.append(seconds)
        self.active.remove(active)
        if run.is_finished:
            if code:
                self.log(f"{run.name}: ended with exit code {code} after its model was saved. Log: {run.log}")
        elif code not in ENDS_BY_SIGNAL:
            self.errors[run.name] = active.error(code)
            rest = "; the others continue" if self.waiting or self.active else ""
            self.log(f"{run.name}: failed with exit code {code}{rest}. Log: {run.log}")
        elif not stopping:
            self.log(f"{run.name}: stopped by a signal; the same command resumes it.")
        report = replace(self._report(), ended=run.name)
        if not stopping and (self.active or self.waiting):  # `run` returns the last report
            self.on_run(report)

    def _log_line(self, run: str, line: str) -> None:
        """Log a line of a run's output, unless an earlier run had the same; `logs/` has all of them."""
        if line not in self.logged:
            self.logged.add(line)
            self.log(f"{run}: {line}")

    def _stop(self) -> None:
        """Stop as Ctrl-C does: on the first call the runs finish their step and save, on the second they end
        at once.
        """
        for active in self.active:
            if active.process.poll() is None:
                active.process.send_signal(SIGTERM)

    def _wait(self) -> None:
        """Wait until every process has ended. Another interrupt kills them."""
        try:
            for active in self.active:
                active.process.wait()
        except BaseException:
            for active in self.active:
                active.process.kill()
            raise

    # -- reporting -------------------------------------------------------------------------------------

    def _log_plan(self) -> None:
        num_begun, num_waiting = sum(run.is_begun for run in self.waiting), len(self.waiting)
        numbers = {
            "finished before": len(self.runs) - num_waiting,
            "to resume": num_begun,
            "to start": num_waiting - num_begun,
        }
        plan = ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
        if (jobs := min(self.options.jobs, num_waiting)) > 1:
            threads = _count(threads_of_a_run(self.options.jobs), "CPU thread")
            plan += f"; {jobs} at once, each with {threads}"
        self.log(f"{_count(len(self.runs), 'run')}: {plan}.")

    def _progress(self) -> SweepProgress:
        num_done = len(self.runs) - len(self.waiting) - len(self.active)
        active = [(active.run.name, active.total_steps, active.last_line) for active in self.active]
        done = num_done + sum(line["step"] / total for _, total, line in active if line and total)
        return SweepProgress(num_done, len(self.runs), active, done, self._seconds_left())

    def _seconds_left(self) -> float | None:
        """An estimate in which waiting runs take the mean duration of the runs with a known speed."""
        known = [
            seconds for active in self.active if (seconds := active.seconds_in_all) is not None
        ] + self.seconds_of_runs
        if not known:
            return None
        mean = sum(known) / len(known)
        of_active = [mean if active.seconds_left is None else active.seconds_left for active in self.active]
        at_once = min(self.options.jobs, len(self.active) + len(self.waiting)) or 1
        return max([(sum(of_active) + mean * len(self.waiting)) / at_once, *of_active])

    def _report(self) -> SweepReport:
        """Write the table of all runs and return it with the other results."""
        rows = sort_rows(
            [
                read_row(
                    run.folder,
                    name=run.name,
                    options=run.varied,
                    state=self._state(run),
                    report=read_report(run),
                    error=self.errors.get(run.name),
                )
                for run in self.runs
            ]
        )
        notes = table_notes(rows, loss_settings()) + _other_data(self.runs)
        write_whole(self.output / "table.csv", table_csv(rows))
        write_whole(self.output / "table.md", table_markdown(f"Sweep {self.output.name}", rows, notes))
        if self.options.plot:
            path = Path(self.options.plot)
            with refused_writes(path, TrainingError, "Then give the same command again."):
                plot_accuracy([(run.name, run.folder) for run in self.runs], path)
        states = [row.state for row in rows]
        return SweepReport(
            output=str(self.output),
            num_runs=len(rows),
            num_finished=states.count("finished"),
            num_failed=states.count("failed"),
            rows=rows,
            notes=notes,
            best=[row.name for row in best_rows(rows)],
            table=str(self.output / "table.md"),
            elapsed_s=time.monotonic() - self.started,
        )

    def _state(self, run: Run) -> str:
        if run.is_finished:
            return "finished"
        if any(active.run is run for active in self.active):
            return "running"
        if run.name in self.errors:
            return "failed"
        return "stopped" if run.is_begun else "waiting"


def _check_runs(options: SweepOptions, grid: Grid) -> None:
    """Raise the `DpoCacheError` that a run would raise before it has loaded a model."""
    runs = [
        TrainOptions(cache=options.cache, output=options.output, **grid.shared, **combination)
        for combination in grid.combinations()
    ]
    for run in _distinct(runs, TRAIN_INPUTS):
        check_train(run)
    for run in _distinct(runs, ("log_to",)):
        check_trackers(run.log_to)
    needs_config = [run for run in runs if any(getattr(run, name) != usual for name, usual in USUAL.items())]
    if needs_config:
        from dpo_cache.training.before_loading import check_later_run  # imports torch

        for run in _distinct(needs_config, (*USUAL, "model", "pairs", "eval_pairs", "lora_r", "quantize")):
            check_later_run(run)


def _distinct(runs: list[TrainOptions], names: Sequence[str]) -> list[TrainOptions]:
    """One run for each combination of values of these options."""
    return list({tuple(getattr(run, name) for name in names): run for run in runs}.values())


def _check_plot(path: Path, grid: Grid) -> None:
    """Raise `OptionError` before anything runs if the plot would be empty or could not be drawn."""
    if all(grid.values(option) == (None,) for option in ("eval_pairs", "eval_fraction")):
        raise OptionError(
            "`plot` draws the accuracy on evaluation pairs, and there are none.\n"
            "Give `eval_pairs` or `eval_fraction`, or leave `plot` out."
        )
    check_plot(path)


def _other_data(runs: list[Run]) -> list[str]:
    """A note for each pair set that has changed in the cache between runs that were trained on it."""
    digests: dict[str, set[str]] = {}
    for run in runs:
        if resolved := read_resolved(run.folder):
            digests.setdefault(resolved["pairs"], set()).add(resolved["pairs_digest"])
    changed = sorted(pairs for pairs, found in digests.items() if len(found) > 1)
    return [
        f"{name} has changed between the runs: they were not trained on the same pairs." for name in changed
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
