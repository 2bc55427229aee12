"""A progress line and remarks on stderr, while a function runs; in a notebook, a bar and tables.

Library functions write nothing by default. With `progress=True` they show the same as the command line.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_cache.errors import printable, printable_lines, shown_bytes
from dpo_cache.log import phases_reported
from dpo_cache.notebook.display import NotebookProgress, notebook_output
from dpo_cache.terminal import Shown, TerminalLine, terminal_width, wrapped

if TYPE_CHECKING:
    from typing_extensions import Self

QUIET_SECONDS = 10.0  # between progress lines off a terminal

_shows_bars: ContextVar[bool] = ContextVar("shows_bars", default=False)

Result = TypeVar("Result")
Show = Callable[..., None]  # gets the line, then the arguments of the callback


def shows_progress(
    title: str, show: Show, *, callback: str = "on_progress"
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorator: the function also takes `progress`. With `progress=True` it shows a progress line.

    `show(line, ...)` gets the arguments of each call of `callback`. Remarks are written next to the line,
    unless the caller gives a `log`.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: Any, progress: bool = False, **given: Any) -> Result:
            if not progress:
                return function(*args, **given)
            other = given.get(callback)

            def report(*values: Any) -> None:
                show(line, *values)
                if other is not None:
                    other(*values)

            with bars_shown(), ProgressLine(title) as line:
                given[callback] = report
                if "log" in signature.parameters:
                    given["log"] = given.get("log") or line.remark
                return function(*args, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        switch = inspect.Parameter("progress", keyword, default=False, annotation="bool")
        parameters = sorted([*signature.parameters.values(), switch], key=lambda parameter: parameter.kind)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


@contextmanager
def bars_shown() -> Iterator[None]:
    """Switch `bars_hidden` off for the functions that are called inside."""
    token = _shows_bars.set(True)
    try:
        yield
    finally:
        _shows_bars.reset(token)


@contextmanager
def bars_hidden(library: str) -> Iterator[None]:
    """Hide the progress bars of `datasets` or `transformers`, except inside `bars_shown`."""
    bars = import_module(f"{library}.utils.logging")
    if _shows_bars.get() or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()


class ProgressLine:
    """A bar on a terminal or in a notebook, and a line every few seconds elsewhere.

    DPO_CACHE_PROGRESS=off shows nothing: a sweep sets it for its runs, whose progress it shows itself.
    """

    def __init__(self, label: str):
        self._label = label
        self._printed = time.monotonic()
        self._is_off = os.environ.get("DPO_CACHE_PROGRESS") == "off"
        self._terminal: TerminalLine | None = None
        self._notebook: NotebookProgress | None = None
        self._share, self._text = 0.0, ""
        self._timer: threading.Timer | None = None
        self._phases = phases_reported(self.phase)
        if self._is_off:
            return
        if show := notebook_output():
            self._notebook = NotebookProgress(label, show)
        elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._terminal = TerminalLine(label)

    def update(
        self, done: float, total: float, details: Sequence[str] = (), *, position: str = "", left: str = ""
    ) -> None:
        """Show how far the work is: its position, the time that is left, and as many of the details as there
        is room for.
        """
        self._share = done / total
        details = tuple(map(printable, details))
        text = "  ".join(filter(None, (position, *details, left)))
        if self._notebook is not None:
            self._notebook.update(self._share, text)
        elif self._terminal is not None:
            self._terminal.update(Shown(position, self._share, details, left))
        elif not self._is_off and time.monotonic() - self._printed >= QUIET_SECONDS:
            self._printed = time.monotonic()
            if text != self._text:  # nothing has moved, such as during a long start
                self._text = text
                remark(f"{self._label}  {text}")

    def phase(self, text: str | None) -> None:
        """Show what is done now, while no progress can be counted; None: progress is counted again."""
        if self._timer is not None:
            self._timer.cancel()
        if self._notebook is not None:
            self._notebook.update(self._share, text or "")
        elif self._terminal is not None:
            self._terminal.phase(text)
        elif text and not self._is_off:
            self._timer = threading.Timer(QUIET_SECONDS, remark, [f"{self._label}: {text} …"])
            self._timer.daemon = True
            self._timer.start()

    def remark(self, text: str) -> None:
        """Write a remark that does not tear the bar."""
        if self._notebook is not None:
            self._notebook.remark(text)
        elif self._terminal is not None:
            self._terminal.print(text)
        else:
            remark(text)

    def note_metrics(self, metrics: dict[str, Any]) -> bool:
        """Add a line of metrics.jsonl to the table of a notebook; returns False elsewhere."""
        if self._notebook is not None:
            self._notebook.note_metrics(metrics)
        return self._notebook is not None

    def note_runs(self, active: Sequence[tuple[str, int | None, dict[str, Any] | None]]) -> None:
        """Show the active runs of a sweep in the table of a notebook; nothing elsewhere."""
        if self._notebook is not None:
            self._notebook.note_runs(active)

    def pause(self, show: Callable[[], None]) -> None:
        """Print a result while the bar is hidden."""
        if self._terminal is not None:
            self._terminal.close()
        show()
        sys.stdout.flush()
        if self._terminal is not None:
            self._terminal.open()

    def __enter__(self) -> Self:
        self._phases.__enter__()
        return self

    def __exit__(self, error: object = None, *_: object) -> None:
        self._phases.__exit__(None, None, None)
        if self._timer is not None:
            self._timer.cancel()
        if self._notebook is not None:
            self._notebook.close(has_failed=error is not None)
        if self._terminal is not None:
            self._terminal.close()


def remark(text: str) -> None:
    """Write a remark to stderr, wrapped to its terminal if it has one."""
    sys.stderr.write(f"{wrapped(printable_lines(text), terminal_width())}\n")
    sys.stderr.flush()


# -- how each command shows its progress -----------------------------------------------------------------


def show_scoring(line: ProgressLine, progress: Any) -> None:
    """Show a `ScoringProgress`."""
    details = [f"{progress.pairs_per_s:.2f} pairs/s", f"{progress.tokens_per_s:,.0f} tokens/s"]
    if progress.num_workers:
        details.insert(0, f"{progress.num_workers} workers")
    if progress.trial_tokens:
        details.insert(0, f"trying chunks of {progress.trial_tokens:,} tokens")
    done, total = progress.num_tokens, progress.total_tokens
    left = f"{format_seconds(progress.seconds_left)} left"
    line.update(done, total, details, position=f"{done / total:.0%}", left=left)


def show_training(line: ProgressLine, metrics: dict[str, Any]) -> None:
    """Show a line of metrics.jsonl: a step on the progress line, an evaluation as a remark.

    In a notebook both are in a table.
    """
    step, total = metrics["step"], metrics["total_steps"]
    is_in_table = line.note_metrics(metrics)
    if "eval/loss" in metrics:
        if not is_in_table:
            line.remark(f"eval at step {step}: {describe_metrics(metrics, 'eval/')}")
        return
    pace = f"{metrics['pairs_per_s']:.2f} pairs/s"
    details = [*_metrics(metrics), pace, shown_bytes(metrics["peak_bytes"])]
    line.update(step, total, details, position=f"step {step}/{total}", left=_left(metrics["left_s"]))


def show_sweep(line: ProgressLine, progress: Any) -> None:
    """Show a `SweepProgress`: its active run in full, or only the steps of several."""
    line.note_runs(progress.active)
    if len(progress.active) == 1:
        name, total, metrics = progress.active[0]
        position = f"run {progress.num_done + 1}/{progress.num_runs}"
        details = [*_describe_step(metrics, total), name]
    else:
        position = f"{progress.num_done}/{progress.num_runs} runs done"
        details = [
            f"{name} " + ("starting" if metrics is None else f"{metrics['step']}/{total}")
            for name, total, metrics in progress.active
        ]
    left = _left(progress.seconds_left)
    line.update(
        progress.done, progress.num_runs, details, position=position, left=f"about {left}" if left else ""
    )


def _describe_step(metrics: dict[str, Any] | None, total: int) -> list[str]:
    if metrics is None:
        return ["starting"]
    pace = f"{metrics['pairs_per_s']:.2f} pairs/s"
    return [f"step {metrics['step']}/{total}", f"loss {metrics['loss']:.4f}", pace]


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{format_seconds(seconds)} left"


def show_bytes(line: ProgressLine, done: int, total: int) -> None:
    """Show how many bytes were read or copied."""
    line.update(done, max(total, 1), position=f"{shown_bytes(done)} of {shown_bytes(total)}")


def show_transfer(line: ProgressLine, progress: Any) -> None:
    """Show a `TransferProgress`."""
    done = f"{shown_bytes(progress.num_bytes)} of {shown_bytes(progress.total_bytes)}"
    files = f"{progress.num_files:,}/{progress.total_files:,} files"
    line.update(
        progress.num_bytes,
        max(progress.total_bytes, 1),
        [files, f"{shown_bytes(progress.bytes_per_s)}/s"],
        position=done,
        left=_left(progress.seconds_left),
    )


def describe_metrics(metrics: dict[str, Any], prefix: str = "") -> str:
    """Loss, accuracy and margin of a line of metrics."""
    return "  ".join(_metrics(metrics, prefix))


def _metrics(metrics: dict[str, Any], prefix: str = "") -> list[str]:
    loss, margin = metrics[f"{prefix}loss"], metrics[f"{prefix}rewards/margins"]
    accuracy = format_share(metrics[f"{prefix}rewards/accuracies"])
    return [f"loss {loss:.4f}", f"accuracy {accuracy}", f"margin {margin:+.4f}"]


def format_share(share: float | None) -> str:
    """A share in percent; `-` if there is none, such as an accuracy where margins are rounding noise."""
    return "-" if share is None else f"{share:.1%}"


def format_seconds(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
