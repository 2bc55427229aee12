"""Remarks: messages of a run to its user, besides its result.

A remark goes to the caller's `log` function, otherwise to the logger `dpo_cache`, which writes nothing unless
the program configures logging. `progress=True` writes remarks to stderr, and reports list them in `remarks`.
Characters that could steer a terminal are escaped in every remark.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

from dpo_cache.errors import printable_lines

Log = Callable[[str], None]
Report = TypeVar("Report")

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
