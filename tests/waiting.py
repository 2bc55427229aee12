"""Waiting for another process or thread, with an end."""

import time
from collections.abc import Callable


def wait_until(has_happened: Callable[[], bool], what: str, limit_s: float = 120.0) -> None:
    """Return as soon as it has happened; fail, naming it, when it has not within the limit."""
    deadline = time.monotonic() + limit_s
    while not has_happened():
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.01)
