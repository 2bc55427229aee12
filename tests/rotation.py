"""Which cases `make test` runs where a test has many: a part of them, another one each day; `make test-slow` runs all.

    @pytest.mark.rotating(3)                       # a third of the cases a day
    @pytest.mark.parametrize(...)

Families of models (`make test-families` runs all of them) rotate by twentieths. `DPO_CACHE_TEST_DAY` chooses the
parts, as the number of a day; without it, it is today's since 0001-01-01.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from zlib import crc32

import pytest

VARIABLE = "DPO_CACHE_TEST_DAY"
NUM_PARTS = 20  # of the families


def set_day() -> str:
    """Set the variable, for this process and those that it starts; returns a line that says how to repeat it."""
    today = datetime.now(timezone.utc).date()
    day = os.environ.setdefault(VARIABLE, str(today.toordinal()))
    return f"tests with many cases, and model families: those of day {day} ({VARIABLE}={day} repeats them)"


def today() -> int:
    """The number of the day whose cases are run."""
    return int(os.environ[VARIABLE])


def is_in_part(family: str, families: Sequence[str]) -> bool:
    """Whether the family is in today's twentieth of these families."""
    return _is_due(sorted(families).index(family), NUM_PARTS)


def mark_others_slow(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of rotating tests that are not due today as slow."""
    num_seen: Counter[str] = Counter()
    for item in items:
        if marker := item.get_closest_marker("rotating"):
            function = item.nodeid.partition("[")[0]
            first = crc32(function.encode())  # other tests begin on other days, so that all days take as long
            if not _is_due(first + num_seen[function], *marker.args):
                item.add_marker(pytest.mark.slow)
            num_seen[function] += 1


def _is_due(number: int, num_parts: int) -> bool:
    return number % num_parts == today() % num_parts
