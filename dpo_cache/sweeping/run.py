"""One cache, several runs: each combination of the options' values is trained in a process of its own, and
all stand in one table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import Any

from dpo_cache.errors import NotInCacheError, OptionError
from dpo_cache.files.locations import check_model
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.options.base import with_new_names
from dpo_cache.options.keywords import keywords_of, make_options
from dpo_cache.options.sweep import SweepOptions, loss_settings
from dpo_cache.progress import show_sweep, shows_progress
from dpo_cache.reporting.runs import (
    RunRow,
    check_plot,
    plot_accuracy,
    read_resolved,
    read_row,
    sort_rows,
    table_csv,
    table_markdown,
    table_notes,
)
from dpo_cache.store import open_cache
from dpo_cache.sweeping.grid import Grid, read_grid
from dpo_cache.sweeping.processes import ENDS_BY_SIGNAL, ActiveRun, run_environment, threads_of_a_run
from dpo_cache.sweeping.sweep_folder import Run, hold_folder, plan_runs, read_report, with_plan, write_whole

POLL_S = 0.2

OnRow = Callable[["SweepReport"], None]


@dataclass(frozen=True)
class SweepProgress:
    """Where a sweep stands: the runs that are done with, and the last step of each that is at work."""

    num_done: int
    num_runs: int
    active: list[
        tuple[str, int | None, dict[str, Any] | None]
    ]  # name, steps in all, its last line of metrics.jsonl
    done: float  # runs, the parts of unfinished ones counted
    seconds_left: float | None  # None before the first step


@dataclass(frozen=True)
class SweepReport:
    """What `sweep` did, or has done so far."""

    output: str
    num_runs: int
    num_finished: int
    num_failed: int
    rows: list[RunRow]  # as the table shows them
    notes: list[str]
    table: str
    elapsed_s: float
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<SweepReport of {self.output}: {self.num_finished:,} of {self.num_runs:,} runs finished, "
            f"{self.num_failed:,} failed>"
        )

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
    given = {"jobs": jobs, "resume": resume, "plot": plot, **options}
    given |= {name: value for name, value in (("cache", cache), ("output", output)) if value is not None}
    chosen = make_options(SweepOptions, with_plan(with_new_names(SweepOptions, given, log)))
    grid = read_grid(chosen)
    if chosen.plot:
        _check_plot(Path(chosen.plot), grid)
    _check_inputs(chosen.cache, grid)
    with hold_folder(Path(chosen.output), log) as lock:
        runs = plan_runs(Path(chosen.output), chosen.cache, grid, resume=bool(chosen.resume))
        work = _Sweep(chosen, runs, lock, on_progress or (lambda _: None), on_run or (lambda _: None), log)
        return work.run(should_stop or (lambda: False))


class _Sweep:
    """The runs of a sweep: those that wait, those at work, and why some failed."""

    def __init__(
        self,
        options: SweepOptions,
        runs: list[Run],
        lock: int | None,
        on_progress: Callable[[SweepProgress], None],
        on_run: OnRow,
        log: Log,
    ):
        self.options, self.runs, self.lock, self.on_progress, self.on_run, self.log = (
            options,
            runs,
            lock,
            on_progress,
            on_run,
            log,
        )
        self.started = time.monotonic()
        self.output = Path(options.output)
        self.waiting = [run for run in runs if not run.is_finished]
        self.active: list[ActiveRun] = []
        self.errors: dict[str, str] = {}
        self.seconds_of_runs: list[float] = []  # what a whole run took, of those that ended here

    def run(self, should_stop: Callable[[], bool]) -> SweepReport:
        """Every run that is left, then the table."""
        self._say_plan()
        asked = False
        try:
            while self.active or (self.waiting and not asked):
                if should_stop() and not asked:
                    asked = True
                    self._ask_to_stop()
                while self.waiting and not asked and len(self.active) < self.options.jobs:
                    self._start(self.waiting.pop(0))
                for active in [*self.active]:
                    if (code := active.poll(self.log)) is not None:
                        self._end(active, code, asked=asked)
                self.on_progress(self._progress())
                time.sleep(POLL_S)
        except BaseException:  # Ctrl-C too: no run is left behind without a sweep
            self._ask_to_stop()
            self._wait()
            raise
        return self._report()

    def _start(self, run: Run) -> None:
        slot = min(set(range(self.options.jobs)) - {active.slot for active in self.active})
        self.active.append(
            ActiveRun(self.options.cache, run, slot, run_environment(self.options.jobs, slot), self.lock)
        )

    def _end(self, active: ActiveRun, code: int, *, asked: bool) -> None:
        run = active.run
        if (seconds := active.seconds_in_all) is not None and run.is_finished:
            self.seconds_of_runs.append(seconds)
        self.active.remove(active)
        if not run.is_finished and code in ENDS_BY_SIGNAL:
            if not asked:
                self.log(f"{run.name}: stopped from outside, and left; the same command goes on with it.")
        elif not run.is_finished:
            self.errors[run.name] = active.error(code)
            rest = "; the others go on" if self.waiting or self.active else ""
            self.log(f"{run.name}: failed with exit code {code}{rest}. All that it said: {run.log}")
        elif code:
            self.log(
                f"{run.name}: ended with exit code {code} after its model was saved. All that it said: "
                f"{run.log}"
            )
        report = self._report()
        if not asked and (self.active or self.waiting):  # else this is the last table, which `run` gives
            self.on_run(report)

    def _ask_to_stop(self) -> None:
        """As Ctrl-C does: the first time they finish the step and save, the second they end at once."""
        for active in self.active:
            if active.process.poll() is None:
                active.process.send_signal(SIGTERM)

    def _wait(self) -> None:
        """Until every process has ended; interrupted again, they are killed."""
        try:
            while any(active.process.poll() is None for active in self.active):
                time.sleep(POLL_S)
        except BaseException:
            for active in self.active:
                active.process.kill()
            raise

    # -- reporting -------------------------------------------------------------------------------------

    def _say_plan(self) -> None:
        begun, jobs = sum(run.is_begun for run in self.waiting), min(self.options.jobs, len(self.waiting))
        finished = len(self.runs) - len(self.waiting)
        parts = [f"{finished} finished before" * bool(finished), f"{begun} to go on with" * bool(begun)]
        parts.append(f"{len(self.waiting) - begun} to begin" * bool(len(self.waiting) - begun))
        at_once = (
            f"; {jobs} at once, each with {_count(threads_of_a_run(self.options.jobs), 'CPU thread')}"
            if jobs > 1
            else ""
        )
        self.log(f"{_count(len(self.runs), 'run')}: {', '.join(filter(None, parts))}{at_once}.")

    def _progress(self) -> SweepProgress:
        num_done = len(self.runs) - len(self.waiting) - len(self.active)
        parts = [
            active.last_line["step"] / active.total_steps
            for active in self.active
            if active.last_line and active.total_steps
        ]
        return SweepProgress(
            num_done=num_done,
            num_runs=len(self.runs),
            active=[(active.run.name, active.total_steps, active.last_line) for active in self.active],
            done=num_done + sum(parts),
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        """The runs that wait are taken to last as those whose pace is known do on average."""
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
        """The table of now, written."""
        rows = sort_rows([self._row(run) for run in self.runs])
        notes = table_notes(rows, loss_settings()) + _other_data(self.runs)
        write_whole(self.output / "table.csv", table_csv(rows))
        write_whole(self.output / "table.md", table_markdown(f"Sweep {self.output.name}", rows, notes))
        if self.options.plot:
            plot_accuracy([(run.name, run.folder) for run in self.runs], Path(self.options.plot))
        states = [row.state for row in rows]
        return SweepReport(
            output=str(self.output),
            num_runs=len(rows),
            num_finished=states.count("finished"),
            num_failed=states.count("failed"),
            rows=rows,
            notes=notes,
            table=str(self.output / "table.md"),
            elapsed_s=time.monotonic() - self.started,
        )

    def _row(self, run: Run) -> RunRow:
        report, error = read_report(run), self.errors.get(run.name)
        return read_row(
            run.folder, name=run.name, options=run.varied, state=self._state(run), report=report, error=error
        )

    def _state(self, run: Run) -> str:
        if run.is_finished:
            return "finished"
        if any(active.run is run for active in self.active):
            return "running"
        if run.name in self.errors:
            return "failed"
        return "stopped" if run.is_begun else "waiting"


def _check_inputs(cache: str, grid: Grid) -> None:
    """Raise `DpoCacheError` for a wrong cache, pair set or model, before a run fails on it."""
    opened = open_cache(cache)
    named = [
        opened.pairs(name).name
        for option in ("pairs", "eval_pairs")
        for name in grid.values(option)
        if name is not None
    ]
    for model in grid.values("model"):
        if model is not None:
            check_model(model)
    known = opened.pair_sets()
    if None in grid.values("pairs") and len(set(known) - set(named)) != 1:
        raise NotInCacheError(
            f"{cache}: {'no pair set' if not known else 'several pair sets'} to train on.\n"
            + (
                f"Say which with `pairs`: {', '.join(known)}."
                if known
                else f"Run `dpo-cache precompute --cache {cache} …` first."
            )
        )


def _check_plot(path: Path, grid: Grid) -> None:
    """Raise `OptionError` before anything runs whose plot would be empty, or could not be drawn."""
    if all(grid.values(option) == (None,) for option in ("eval_pairs", "eval_fraction")):
        raise OptionError(
            "`plot` draws held-out accuracy, and nothing is held out.\n"
            "Give `eval_pairs` or `eval_fraction`, or leave `plot` out."
        )
    check_plot(path)


def _other_data(runs: list[Run]) -> list[str]:
    """A note where runs that name one pair set were given other pairs, because the cache has changed between
    them.
    """
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
