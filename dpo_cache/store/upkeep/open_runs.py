"""The records of runs of `precompute` that are at work, or were killed before they had ended.

`run_record.py` specifies the record and writes it. Upkeep leaves the score shards that it names as they are:
a run whose audit fails withdraws them by their names, and must find them.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from typing import Any

import psutil

from dpo_cache.errors import CacheError, CorruptShardError, StorageError
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.format.documents import Document, read_sealed
from dpo_cache.store.upkeep.contents import classify

PATTERN = re.compile(r"\.run-[0-9a-f]{16}\.json")
RUN_DIGITS = 8  # the token's first digits identify the run, the others its worker
GRACE_S = 3600.0  # a record of another machine that is older belongs to a run that was killed
STARTS_ALIKE_S = 1.0  # a process's start as two look-ups report it

STATES = ("scoring", "auditing", "withdrawing")
KINDS = {
    "host": str,
    "pid": int,
    "started": str,
    "process_started": int,
    "state": str,
    "shards": list,
    "pair_sets": dict,
    "is_new": bool,
}

at_work: set[str] = set()  # this process's runs, see `run_of`


def shards_of_runs(folder: Folder, reference_id: str) -> set[str]:
    """Score shards, by their names from the root, that a failed audit may yet withdraw: of runs that are at
    work, were killed in the middle of an audit, or are withdrawing them.

    A run records a shard before it publishes it. So list the shards first and call this afterwards: then no
    shard of the list that is not in the result will be withdrawn.
    """
    place = f"references/{reference_id}"
    records = {name: read_record(folder, name) for name in run_records(folder, place)}
    audited, found = _in_audit(records), set[str]()
    for name, content in records.items():
        if run_of(name) in audited or is_at_work(folder, name, content):
            found |= {*content["shards"], *content.get("files", [])}
    return found


def runs_in_audit(folder: Folder, place: str) -> set[str]:
    """The runs, as of `run_of`, that are auditing or withdrawing, or were killed in it, as far as their
    records can be read.
    """
    records = dict[str, Document]()
    for name in run_records(folder, place):
        with suppress(CacheError):  # `verify` reports it
            records[name] = read_record(folder, name)
    return _in_audit(records)


def _in_audit(records: dict[str, Document]) -> set[str]:
    """The runs that are auditing or withdrawing, or were killed in it. The records of a run's workers do not
    show it: the audit is that of the run.
    """
    return {run_of(name) for name, content in records.items() if content["state"] != "scoring"}


def run_records(folder: Folder, place: str) -> list[str]:
    """The records in a reference's folder, by their names from the root."""
    return [f"{place}/{name}" for name in folder.hidden_names(place) if PATTERN.fullmatch(name)]


def run_of(record: str) -> str:
    """The beginning of the record's name that it has in common with the records of the run's workers."""
    return record[: -len(".json") - 16 + RUN_DIGITS]


def records_of_killed_runs(folder: Folder, place: str) -> list[tuple[str, Document]]:
    """Records of runs that are not at work, by their names from the root; all that are withdrawing. One that
    another user does not let this one read is of no run of this one's.
    """
    found = []
    for record in run_records(folder, place):
        if run_of(record) not in at_work:
            try:
                content = read_record(folder, record)
            except StorageError as error:
                if not error.is_denied:
                    raise
                continue
            if content["state"] == "withdrawing" or not is_at_work(folder, record, content):
                found.append((record, content))
    return found


def read_record(folder: Folder, record: str) -> Document:
    """A record, checked: everything that it names is a file of the cache."""
    content = read_sealed(folder, record)
    kinds = {name: type(value) for name, value in content.items()}
    is_shaped = {**kinds, **KINDS} == kinds and content["state"] in STATES
    if is_shaped:
        files = [*content["shards"], *content.get("files", [])]
        is_shaped = all(isinstance(file, str) and classify(file)[0] in ("shard", "part") for file in files)
    if not is_shaped or (content["state"] == "withdrawing") != ("manifests" in content):
        raise CorruptShardError(
            f"{folder}/{record}: is not a record of a run.\n`dpo-cache verify --repair` moves it aside."
        )
    return content


def this_process() -> dict[str, Any]:
    """The members of a record that identify the process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "process_started": round(psutil.Process().create_time()),
    }


def is_at_work(folder: Folder, record: str, content: Document) -> bool:
    """Return whether the record's run may still be at work."""
    if run_of(record) in at_work:
        return True
    if content["host"] != socket.gethostname():
        modified = folder.modified(record)
        return modified is None or time.time() - modified < GRACE_S
    if content["pid"] == os.getpid():
        return False  # a run of this process that is at work is in `at_work`
    try:
        started = psutil.Process(content["pid"]).create_time()
    except psutil.Error:
        return False
    return abs(started - content["process_started"]) <= STARTS_ALIKE_S
