"""Time, memory and disk of a run that is not started: the last lines of a dry run.

For scoring, all is counted from the model's config (`scoring_forecast.py`); for training, the steps of the
dry run show the speed. This module imports no code that runs models: reports hold a `Forecast`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Forecast:
    """The predicted time, memory and disk of a run."""

    seconds: float | None  # None: the speed of the devices is unknown on this machine
    device: str
    device_bytes: int | None  # peak bytes of each device; None: unknown
    free_device_bytes: int | None
    disk_bytes: int  # upper bound
    free_disk_bytes: int | None  # None: a store without a limit
    num_workers: int = 1  # workers that compute at once
    source: str = ""  # the source of the speed behind `seconds`
