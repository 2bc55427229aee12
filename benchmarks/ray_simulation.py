"""An event simulation of a run on Ray with more workers than this machine can hold.

The driver is one server with a queue: each unit costs it some time twice, when it is handed out and when its
receipt comes. A worker has one unit at a time, which takes its scoring, publishing and a call to the ledger,
another server with a queue. All workers start at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on the machine that the table names."""

    hand_out: float  # of the driver for a unit that goes to a worker
    receipt: float  # of the driver for a unit that comes back: Ray Data's loop, report, index
    ledger: float  # of the ledger for the calls of a unit
    publish: float  # of a worker for a unit's shard and record


@dataclass(frozen=True)
class Simulated:
    """A simulated run; `efficiency` is the ideal time, all units divided by the workers, over the real one."""

    elapsed_s: float  # from the moment when the workers have started
    efficiency: float
    driver_share: float  # of the time that the driver is busy
    ledger_share: float


def simulate(unit_s: Sequence[float], num_workers: int, costs: Costs) -> Simulated:
    """Run units that take so many seconds of scoring each, in this order, as workers become free."""
    # (when, order, event, worker); the driver handles what reaches it in order of time
    events: list[tuple[float, int, str, int]] = [
        (0.0, number, "free", number) for number in range(num_workers)
    ]
    heapq.heapify(events)
    driver_at = ledger_at = driver_busy = ledger_busy = ended = 0.0
    next_unit, order = 0, num_workers
    while events:
        now, _, event, worker = heapq.heappop(events)
        if event == "receipt":
            driver_at = max(driver_at, now) + costs.receipt
            driver_busy += costs.receipt
            ended = max(ended, driver_at)
            now = driver_at
        if next_unit == len(unit_s):
            continue
        driver_at = max(driver_at, now) + costs.hand_out
        driver_busy += costs.hand_out
        ledger_at = max(ledger_at, driver_at) + costs.ledger
        ledger_busy += costs.ledger
        done = ledger_at + unit_s[next_unit] + costs.publish
        next_unit, order = next_unit + 1, order + 1
        heapq.heappush(events, (done, order, "receipt", worker))
    return Simulated(ended, sum(unit_s) / num_workers / ended, driver_busy / ended, ledger_busy / ended)
