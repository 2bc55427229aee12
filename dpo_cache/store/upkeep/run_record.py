"""The record of a run of `precompute`: what it published, so that all of it can be withdrawn.

`references/<id>/.run-<token>.json` is a sealed document. It is written before each file that it names, and
removed at the end of the run, so one that is left belongs to a run that is at work or was killed.

    host, pid, started   the process of the run
    state                scoring; auditing: the run compares scores, and publishes none meanwhile; withdrawing
    shards               names of the score shards that the run published, or was about to publish
    pair_sets            NAME/SPLIT -> {"digest", "created", "before"}: the pairs_digest and date of the run's
                         manifest, and the manifest that it replaced, or null
    is_new               whether the run published the entry of its reference
    manifests, files     once it is withdrawing: see `_plan`

Workers that score for a run in other processes have records of their own, with the run's process in them.
The first 8 of the 16 digits of their tokens are the run's: what they published is withdrawn with it.

Files are withdrawn by their names, so `compact` and `gc` leave the shards of such a record as they are
(`open_runs.py`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from dpo_cache.errors import StorageError, first_line
from dpo_cache.store.cache import Cache
from dpo_cache.store.format.documents import Document, digest_bytes, seal_document
from dpo_cache.store.format.pair_tables import part_files, read_manifest
from dpo_cache.store.upkeep.open_runs import (
    GRACE_S,
    RUN_DIGITS,
    at_work,
    read_record,
    records_of_killed_runs,
    run_of,
    run_records,
    this_process,
)
from dpo_cache.store.upkeep.removal import removal_order

RENEW_S = GRACE_S / 6


class RunRecord:
    """Records what a run publishes under one reference; `with` ends the record, whatever ends the run.

    A run that fails its audit calls `fail`; then the end of the block withdraws what the run published, and
    what runs published that were killed in the middle of an audit: nobody knows what theirs would have found.
    Nothing is written before something is published.
    """

    def __init__(self, cache: Cache, reference_id: str, *, run: Document | None = None):
        """`run` is given to the record of a worker, see `for_workers`. It is used without `with`: the end of
        the run's own record removes it, or withdraws its files.
        """
        self.cache = cache
        self._reference = f"references/{reference_id}"
        token = (run["token"] if run else "") + secrets.token_hex(8)
        self._name = f"{self._reference}/.run-{token[:16]}.json"
        self._content: Document = {
            **(run["process"] if run else this_process()),
            "state": "scoring",
            "shards": [],
            "pair_sets": {},
            "is_new": run["is_new"] if run else not cache.folder.exists(f"{self._reference}/reference.json"),
        }
        self._killed: dict[str, Document] = {}  # records of runs that were killed in an audit
        self._has_audited = self._is_written = False
        self._has_workers, self._written = False, 0.0
        self.num_lost = 0  # once it failed: its shards that others have removed

    def __enter__(self) -> RunRecord:
        at_work.add(run_of(self._name))
        records = records_of_killed_runs(self.cache.folder, self._reference)
        self._killed = {
            name: content
            for together in _by_run(records)
            if any(content["state"] == "auditing" for _, content in together)
            for name, content in together
        }
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if "manifests" in self._content:
                for name, content in {**self._killed, self._name: self._content}.items():
                    _withdraw(self.cache, name, content)
            else:
                for name in self._killed if self._has_audited else ():
                    _remove_record(self.cache, name)
                for name in self._records_of_workers():
                    _remove_record(self.cache, name)
                if self._is_written:
                    self.cache.folder.remove(self._name)
        finally:
            at_work.discard(run_of(self._name))

    def for_workers(self) -> Document:
        """The arguments for the records of this run's workers, see `__init__`, and the name of this record,
        which is written now: a worker that does not find it has another folder under the cache's path.
        """
        self._has_workers = True
        self._write("scoring")
        return {
            "token": run_of(self._name)[-RUN_DIGITS:],
            "process": {name: self._content[name] for name in this_process()},
            "is_new": self._content["is_new"],
            "record": self._name,
        }

    @property
    def has_published(self) -> bool:
        return bool(self._content["shards"] or self._content["pair_sets"])

    def renew(self) -> None:
        """Rewrite the record of a run with workers now and then: on other machines, one that is not rewritten
        for an hour counts as a killed run's.
        """
        if time.monotonic() - self._written >= RENEW_S:
            self._write(self._content["state"])

    def add_shard(self, name: str) -> None:
        """Record a score shard, by its name from the root, before it is published."""
        self._content["shards"].append(name)
        self._write("scoring")

    def add_pair_set(self, name: str, details: Document) -> None:
        """Record the pair set `NAME/SPLIT` before its manifest with these details is published."""
        before = read_manifest(self.cache.folder, f"pairs/{name}") if self.cache.holds_pairs(name) else None
        self._content["pair_sets"][name] = {
            "digest": details["pairs_digest"],
            "created": details["source"]["created"],
            "before": before,
        }
        self._write("scoring")

    def begin_audit(self) -> None:
        """Record that scores are being compared. If the run is killed now, and the next one fails its audit,
        this one's files are withdrawn, too.
        """
        if self.has_published:
            self._write("auditing")

    def end_audit(self) -> None:
        """Record that the scores agreed."""
        self._has_audited = True
        if self.has_published:
            self._write("scoring")

    def fail(self) -> tuple[int, int]:
        """Record, durably, that everything is to be withdrawn; returns the number of shards and of pair
        sets. Then `num_lost` of this run's shards were not found: other files may hold their scores.

        Its workers must have ended before.
        """
        exists = self.cache.folder.exists
        workers = {name: read_record(self.cache.folder, name) for name in self._records_of_workers()}
        published = [shard for one in (*workers.values(), self._content) for shard in one["shards"]]
        self.num_lost = sum(not exists(shard) for shard in published)
        self._killed |= workers
        for name, content in self._killed.items():
            content |= {**_plan(self.cache, self._reference, content), "state": "withdrawing"}
            self.cache.folder.publish(name, seal_document(content))
        self._content |= _plan(self.cache, self._reference, self._content)
        if self._is_written:
            self._write("withdrawing")
        withdrawn = [self._content, *self._killed.values()]
        return (
            sum(len(content["shards"]) for content in withdrawn),
            sum(len(content["manifests"]) for content in withdrawn),
        )

    def _records_of_workers(self) -> list[str]:
        if not self._has_workers:
            return []
        records, run = run_records(self.cache.folder, self._reference), run_of(self._name)
        return [name for name in records if run_of(name) == run and name != self._name]

    def _write(self, state: str) -> None:
        self._content["state"] = state
        self._is_written, self._written = True, time.monotonic()
        self.cache.publish_format()
        self.cache.folder.publish(self._name, seal_document(self._content))


def end_killed_runs(cache: Cache, reference_id: str) -> list[str]:
    """Withdraw the files of runs under the reference that were killed while they withdrew them.

    Returns a remark for each. Scores of runs that were killed otherwise stay; if one was killed in the middle
    of an audit, its record stays for the next audit, see `RunRecord`. Runs at work are not changed.
    """
    remarks = []
    for together in _by_run(records_of_killed_runs(cache.folder, f"references/{reference_id}")):
        states = {content["state"] for _, content in together}
        if states == {"scoring"}:
            for record, _ in together:
                _remove_record(cache, record)
        elif "withdrawing" in states:
            remarks.append(_end_withdrawal(cache, together))
    return remarks


def _end_withdrawal(cache: Cache, together: Sequence[tuple[str, Document]]) -> str:
    """Withdraw the files of one run, and of its workers. Returns a remark."""
    started = together[0][1]["started"]
    try:
        # the one that makes others finish this comes last
        for record, content in sorted(together, key=lambda entry: entry[1]["state"] == "withdrawing"):
            if content["state"] != "withdrawing":
                content |= {**_plan(cache, record.rpartition("/")[0], content), "state": "withdrawing"}
            _withdraw(cache, record, content)
    except StorageError as error:
        if not error.is_denied:
            raise
        return (
            f"a run of another user of {started} failed its audit and was ended before it "
            f"had withdrawn its files; this user may not withdraw them ({first_line(error)}). Until its "
            "owner runs `dpo-cache precompute` again, scores of this reference may be wrong."
        )
    return (
        f"an earlier run of {started} failed its audit and was ended before it had "
        f"withdrawn its files: the {sum(len(content['shards']) for _, content in together)} score files and "
        f"{sum(len(content['manifests']) for _, content in together)} pair sets that it had published were "
        "withdrawn now."
    )


def _by_run(records: Sequence[tuple[str, Document]]) -> list[list[tuple[str, Document]]]:
    """The records of each run and of its workers together."""
    runs: dict[str, list[tuple[str, Document]]] = {}
    for record, content in records:
        runs.setdefault(run_of(record), []).append((record, content))
    return [*runs.values()]


def _remove_record(cache: Cache, record: str) -> None:
    """Remove it, unless it is another user's, who does so with the next run."""
    try:
        cache.folder.remove(record)
    except StorageError as error:
        if not error.is_denied:
            raise


def _plan(cache: Cache, reference: str, content: Document) -> Document:
    """The files to remove, and the pair sets to remove or restore if they are still the run's own."""
    manifests: dict[str, Any] = {}
    files = set(content["shards"])
    for name, entry in content["pair_sets"].items():
        if not cache.holds_pairs(name):
            continue
        manifest = read_manifest(cache.folder, f"pairs/{name}")
        found = manifest.get("pairs_digest"), manifest.get("source", {}).get("created")
        if f"references/{manifest['reference']}" != reference or found != (entry["digest"], entry["created"]):
            continue  # another run has replaced it
        manifests[name] = {"sha256": digest_bytes(seal_document(manifest)), "before": entry["before"]}
        files |= part_files(manifest).keys()
    return {"manifests": manifests, "files": sorted(files, key=removal_order)}


def _withdraw(cache: Cache, record: str, content: Document) -> None:
    """Carry out the plan; repeated after an interruption, it does the rest."""
    folder, reference = cache.folder, record.rpartition("/")[0]
    needed: set[str] = set()
    for name, entry in content["manifests"].items():
        file = f"pairs/{name}/manifest.json"
        if cache.holds_pairs(name) and digest_bytes(folder.read(file)) == entry["sha256"]:
            if entry["before"] is None:
                folder.remove(file)
            else:
                folder.publish(file, seal_document(entry["before"]))
        if cache.holds_pairs(name):
            needed |= part_files(read_manifest(folder, f"pairs/{name}")).keys()
    for file in content["files"]:
        if file not in needed:
            folder.remove(file)
    is_used = folder.names(f"{reference}/scores") or any(
        f"references/{cache.pairs(name).reference_id}" == reference for name in cache.pair_sets()
    )
    if content["is_new"] and not is_used:
        folder.remove(f"{reference}/reference.json")
    folder.remove(record)
