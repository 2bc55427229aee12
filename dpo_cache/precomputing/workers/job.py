"""What goes from the driver to its workers and back. All of it can be pickled.

Job      what a worker needs to score any unit of the run, on any machine
Receipt  what a worker did with one unit
Failure  why it could not do all of it
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
    """A run, as its workers know it.

    `options` have absolute paths, URLs and Hub ids, and no `auto` for the dtype and the device: two machines
    may choose differently.
    """

    options: PrecomputeOptions
    reference_id: str
    identity: Document
    provenance: Document
    longest_tokens: int  # of a completion of the run
    run_tokens: int  # to be scored in the whole run, about
    longest: Sequence[Entry]  # each worker audits these before it publishes anything
    run: Document  # see `RunRecord.for_workers`


@dataclass(frozen=True)
class Failure:
    """An error in a worker. Scores that it had computed before are published nevertheless.

    With `withdraws`, scores were wrong: nothing that the run published may stay, and `advice` is to follow
    the sentence that names what was withdrawn.
    """

    kind: str  # the error's class in `errors.py`
    message: str
    rows: tuple[int, ...] = ()  # of the unit
    withdraws: bool = False
    advice: str = ""


@dataclass(frozen=True)
class Receipt:
    """What a worker did with the unit of this number. Its scores are in the cache when the receipt is
    returned.
    """

    number: int
    worker: str
    # published score shards: the name, which is the sha256 of the file's bytes, -> the keys of its rows, S16
    shards: dict[str, np.ndarray] = field(default_factory=dict)
    num_tokens: int = 0  # run through the model
    elapsed_s: float = 0.0  # of scoring, without loading
    load_s: float = 0.0  # of loading the model, for the first unit of a worker
    bytes_written: int = 0
    audited: AuditTotals | None = None  # by the worker so far
    attention: str | None = None
    budget_tokens: int | None = None
    loaded_bytes: int = 0  # peak memory of the worker when it had loaded the model
    peak_bytes: int = 0
    readings: tuple[str, int, int] | None = None  # place, count, bytes so far, where weights are streamed
    remarks: tuple[str, ...] = ()
    num_workers: int = 0  # at work when the receipt came
    log_file: str = ""  # of the worker
    failure: Failure | None = None

    @property
    def num_completions(self) -> int:
        """Completions that were published."""
        return sum(map(len, self.shards.values()))


def rows_of(unit: Unit) -> tuple[int, ...]:
    """The rows of the unit, as far as they are known, ascending."""
    return tuple(sorted({row for rows in unit.rows for row in rows}))
