"""The messages between the driver and its workers. All of them can be pickled.

Job      the data that a worker needs to score any unit of the run, on any machine
Receipt  the result of a worker for one unit
Failure  the error that ended a unit early
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.precomputing.audit import AuditTotals
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.windows import Entry
from dpo_cache.store.format.documents import Document


@dataclass(frozen=True)
class Job:
    """The description of a run for its workers.

    `options` have absolute paths, URLs and Hub ids, and no `auto` for the dtype and the device: two machines
    may choose differently.
    """

    options: PrecomputeOptions
    reference_id: str
    identity: Document
    provenance: Document
    longest_tokens: int  # tokens of the run's longest completion
    run_tokens: int  # about the number of tokens to score in the whole run
    longest: Sequence[Entry]  # each worker audits these before it publishes anything
    run: Document  # see `RunRecord.for_workers`


@dataclass(frozen=True)
class Failure:
    """An error in a worker. Scores that it computed before the error are still published.

    With `withdraws`, scores were wrong: all files that the run published are removed, and `advice` follows
    the sentence that names what was withdrawn.
    """

    kind: str  # the error's class in `errors.py`
    message: str
    rows: tuple[int, ...] = ()  # rows of the unit
    withdraws: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Receipt:
    """The result of a worker for the unit of this number. The scores are in the cache when the receipt is
    returned.
    """

    number: int
    worker: str
    # published score shards: the name, which is the sha256 of the file's bytes, -> the keys of its rows, S16
    shards: dict[str, np.ndarray] = field(default_factory=dict)
    num_tokens: int = 0  # run through the model
    elapsed_s: float = 0.0  # seconds of scoring, without loading
    load_s: float = 0.0  # seconds of loading the model, in a worker's first receipt
    bytes_written: int = 0
    audited: AuditTotals | None = None  # totals of the worker so far
    attention: str | None = None
    budget_tokens: int | None = None
    loaded_bytes: int = 0  # peak memory of the worker when it had loaded the model
    peak_bytes: int = 0
    readings: tuple[str, int, int] | None = None  # place, count and bytes so far, if weights are streamed
    remarks: tuple[str, ...] = ()
    num_workers: int = 0  # workers that were active when the receipt came
    log_file: str = ""  # path of the worker's log
    failure: Failure | None = None

    @property
    def num_completions(self) -> int:
        """The number of completions that were published."""
        return sum(map(len, self.shards.values()))


def rows_of(unit: Unit) -> tuple[int, ...]:
    """The rows of the unit, as far as they are known, ascending."""
    return tuple(sorted({row for rows in unit.rows for row in rows}))
