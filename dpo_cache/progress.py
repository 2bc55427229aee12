"""What a function reports while it runs: a progress line and remarks on stderr, only where they are wanted.

Library functions write nothing by default. With `progress=True` they show what the command line shows.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 10.0  # between progress lines off a terminal

_shows_bars: ContextVar[bool] = ContextVar("shows_bars", default=False)

Result = TypeVar("Result")
Show = Callable[..., None]  # of the line, and of what the callback gets


def shows_progress(
    title: str, show: Show, *, callback: str = "on_progress"
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: the function takes `progress` as well. With `progress=True` it shows a progress line.

    Every value that the function gives to `callback` also goes to `show(line, ...)`. Remarks are written
    next to the line, unless the caller gives a `log`.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: Any, progress: bool = False, **given: Any) -> Result:
            if not progress:
                return function(*args, **given)
            with bars_shown(), ProgressLine(title) as line:
                given[callback] = _both(partial(show, line), given.get(callback))
                if "log" in signature.parameters:
                    given["log"] = given.get("log") or line.remark
                return function(*args, **given)

        parameters = list(signature.parameters.values())
        switch = inspect.Parameter(
            "progress", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool"
        )
        place = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*parameters[:place], switch, *parameters[place:]]
        )
        return run

    return decorate


def _both(one: Callable[..., None], other: Callable[..., None] | None) -> Callable[..., None]:
    def call(*values: Any) -> None:
        one(*values)
        if other is not None:
            other(*values)

    return call


@contextmanager
def bars_shown() -> Iterator[None]:
    """Let functions that are called here leave the progress bars of other libraries as they are."""
    token = _shows_bars.set(True)
    try:
        yield
    finally:
        _shows_bars.reset(token)


@contextmanager
def bars_hidden(library: str) -> Iterator[None]:
    """Hide the progress bars of `datasets` or `transformers`, except inside `bars_shown`."""
    is_shown, hide, show = _bars_of(library)
    if _shows_bars.get() or not is_shown():
        yield
        return
    hide()
    try:
        yield
    finally:
        show()


def _bars_of(library: str) -> tuple[Callable[[], bool], Callable[[], None], Callable[[], None]]:
    """Whether the bars of the library are shown, and how to hide and to show them."""
    if library == "datasets":
        import datasets

        is_shown = lambda: not datasets.are_progress_bars_disabled()  # noqa: E731
        return is_shown, datasets.disable_progress_bars, datasets.enable_progress_bars
    from transformers.utils import logging

    return logging.is_progress_bar_enabled, logging.disable_progress_bar, logging.enable_progress_bar


Line = TypeVar("Line", bound="ProgressLine")


class ProgressLine:
    """A bar on a terminal, and a line every few seconds elsewhere.

    DPO_CACHE_PROGRESS=off shows nothing, as in a run whose sweep shows its progress.
    """

    def __init__(self, description: str):
        self._description = description
        self._started = self._printed = time.monotonic()
        self._is_off = os.environ.get("DPO_CACHE_PROGRESS") == "off"
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not self._is_off:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}")
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(description, detail="")

    def update(self, done: float, total: float, detail: str) -> None:
        """Show how far the work is."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, detail=detail)
        elif not self._is_off and time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed = time.monotonic()
            remark(f"{self._description} {done / total:4.0%}  {detail}")

    def remark(self, text: str) -> None:
        """Write a remark that does not tear the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            remark(text)

    def pause(self, show: Callable[[], None]) -> None:
        """Print a result while the bar is hidden."""
        if self._bar is not None:
            self._bar.stop()
        show()
        sys.stdout.flush()
        if self._bar is not None:
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self: Line) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remark(text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# -- what each command shows -----------------------------------------------------------------------------


def show_scoring(line: ProgressLine, progress: Any) -> None:
    """Show a `ScoringProgress`."""
    rates = f"{progress.tokens_per_s:,.0f} tokens/s  {progress.pairs_per_s:.2f} pairs/s"
    line.update(
        progress.num_tokens, progress.total_tokens, f"{rates}  {format_seconds(progress.seconds_left)} left"
    )


def show_training(line: ProgressLine, metrics: dict[str, Any]) -> None:
    """Show a line of metrics.jsonl: a step on the progress line, an evaluation as a remark."""
    step, total = metrics["step"], metrics["total_steps"]
    if "eval/loss" in metrics:
        line.remark(f"eval at step {step}: {describe_metrics(metrics, 'eval/')}")
        return
    left = "" if metrics["left_s"] is None else f"  {format_seconds(metrics['left_s'])} left"
    pace = f"{metrics['pairs_per_s']:.2f} pairs/s  {format_bytes(metrics['peak_bytes'])}{left}"
    line.update(step, total, f"step {step}/{total}  {describe_metrics(metrics)}  {pace}")


def show_sweep(line: ProgressLine, progress: Any) -> None:
    """Show a `SweepProgress`."""
    line.update(progress.done, progress.num_runs, _describe_sweep(progress))


def _describe_sweep(progress: Any) -> str:
    left = "" if progress.seconds_left is None else f"  about {format_seconds(progress.seconds_left)} left"
    if len(progress.active) == 1:
        name, total, metrics = progress.active[0]
        step = (
            "starting"
            if metrics is None
            else f"step {metrics['step']}/{total}  loss {metrics['loss']:.4f}  "
            f"{metrics['pairs_per_s']:.2f} pairs/s"
        )
        return f"run {progress.num_done + 1}/{progress.num_runs}  {name}  {step}{left}"
    steps = [
        f"{name} " + ("starting" if metrics is None else f"{metrics['step']}/{total}")
        for name, total, metrics in progress.active
    ]
    return f"{progress.num_done}/{progress.num_runs} runs done  {'  '.join(steps)}{left}"


def show_bytes(line: ProgressLine, done: int, total: int) -> None:
    """Show how many bytes were read or copied."""
    line.update(done, max(total, 1), f"{format_bytes(done)} of {format_bytes(total)}")


def show_transfer(line: ProgressLine, progress: Any) -> None:
    """Show a `TransferProgress`."""
    files = f"{progress.num_files:,}/{progress.total_files:,} files"
    done = f"{format_bytes(progress.num_bytes)} of {format_bytes(progress.total_bytes)}"
    rate = f"{progress.bytes_per_s / 1e6:.1f} MB/s  {format_seconds(progress.seconds_left)} left"
    line.update(progress.num_bytes, max(progress.total_bytes, 1), f"{files}  {done}  {rate}")


def describe_metrics(metrics: dict[str, Any], prefix: str = "") -> str:
    """Loss, accuracy and margin of a line of metrics."""
    loss, accuracy, margin = (
        metrics[prefix + name] for name in ("loss", "rewards/accuracies", "rewards/margins")
    )
    return f"loss {loss:.4f}  accuracy {accuracy:.1%}  margin {margin:+.4f}"


def format_bytes(num_bytes: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def format_seconds(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
