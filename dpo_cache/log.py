"""Remarks and phases: messages of a run to its user, besides its result.

A remark goes to the caller's `log` function, otherwise to the logger `dpo_cache`, which writes nothing unless
the program configures logging. `progress=True` writes remarks to stderr, and reports list them in `remarks`.
Characters that could steer a terminal are escaped in every remark.

A phase is what a run does before its progress can be counted, such as loading a model. A progress line shows
it:

    with phase("loading the model"):
        ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

from dpo_cache.errors import printable_lines

Log = Callable[[str], None]
OnPhase = Callable[[str | None], None]  # None: progress is counted again
Report = TypeVar("Report")

_on_phase: ContextVar[OnPhase | None] = ContextVar("on_phase", default=None)
_phase: ContextVar[str | None] = ContextVar("phase", default=None)

_logger = logging.getLogger("dpo_cache")
# without one, Python prints warnings where logging is not configured
_logger.addHandler(logging.NullHandler())


def log_remark(text: str) -> None:
    """Log the remark as a warning of the logger `dpo_cache`."""
    _logger.warning("%s", printable_lines(text))


def keeps_remarks(function: Callable[..., Report]) -> Callable[..., Report]:
    """Decorator: the report of a function that takes `log` lists every remark in `remarks`, in order."""

    @wraps(function)
    def run(*args: Any, log: Log | None = None, **given: Any) -> Report:
        remarks: list[str] = []
        write = log or log_remark

        def note(text: str) -> None:
            remarks.append(printable_lines(text))
            write(remarks[-1])

        report = function(*args, log=note, **given)
        return replace(report, remarks=remarks)  # type: ignore[type-var]

    return run


@contextmanager
def phase(text: str) -> Iterator[None]:
    """Report that the block does this; inside another phase, that one is reported again afterwards.

    Also a decorator. Reports nothing outside `phases_reported`, such as in a thread.
    """
    report = _on_phase.get()
    if report is None:
        yield
        return
    token = _phase.set(text)
    report(text)
    try:
        yield
    finally:
        _phase.reset(token)
        report(_phase.get())


@contextmanager
def phases_reported(to: OnPhase) -> Iterator[None]:
    """Report the phases of the block to this function."""
    token = _on_phase.set(to)
    try:
        yield
    finally:
        _on_phase.reset(token)
