"""Stopping a command from outside, by Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from dpo_cache.log import Log

if TYPE_CHECKING:
    from typing_extensions import Self

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(BaseException):
    """Ctrl-C, as an exception that typer does not catch: it would exit with 1."""


class Terminated(BaseException):
    """SIGTERM as an exception, so that results in memory are written as after Ctrl-C."""


class StoppedEarly(BaseException):
    """A run that stopped on request has saved its state."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


class _Handler:
    """Handles Ctrl-C and SIGTERM while it is open."""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopRequest(_Handler):
    """While open, the first Ctrl-C or SIGTERM is recorded, so that the run stops after its step. The second
    stops it at once.
    """

    def __init__(self, log: Log):
        self._log = log
        self.exit_code: int | None = None

    @property
    def is_asked(self) -> bool:
        return self.exit_code is not None

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.exit_code = EXIT_CODES[signal.Signals(number)]
        self._log("stopping after this step, then saving (again: stop at once, losing what is not saved)")


class Unwinding(_Handler):
    """While open, the first Ctrl-C or SIGTERM raises an exception in the command, so that results in memory
    are written. The second only logs a remark, to leave time for writing. The third raises again and may lose
    results.
    """

    def __init__(self, log: Log):
        self._log = log
        self._num_asked = 0

    def _ask(self, number: int, _: FrameType | None) -> None:
        self._num_asked += 1
        if self._num_asked == 2:
            self._log("stopping; what is waiting is saved first (again: stop at once, losing it)")
            return
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated
