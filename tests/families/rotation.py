"""Which families `make test` runs: a tenth, another one each day; `make test-families` runs all.

`DPO_CACHE_FAMILY_PART` chooses the tenth, 0 to 9. Without it, it is the number of the day since 0001-01-01,
modulo ten.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone

VARIABLE = "DPO_CACHE_FAMILY_PART"
NUM_PARTS = 10


def set_part() -> str:
    """Set the variable, for this process and those that it starts; returns a line that says how to repeat it."""
    today = datetime.now(timezone.utc).date()
    part = os.environ.setdefault(VARIABLE, str(today.toordinal() % NUM_PARTS))
    return f"model families: part {part} of 0 to {NUM_PARTS - 1} ({VARIABLE}={part} repeats it)"


def is_in_part(family: str, families: Sequence[str]) -> bool:
    """Whether the family is in the chosen tenth of these families."""
    return sorted(families).index(family) % NUM_PARTS == int(os.environ[VARIABLE])
