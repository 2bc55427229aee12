"""Garbage: unneeded files of a cache, found, shown and removed. Others may read and write meanwhile.

A file younger than a grace period is no garbage: a writer publishes parts before the manifest that names
them, and an interrupted `precompute` leaves scores that its next run needs. A writer that names an older file
is noticed, or notices that the file is gone (see `removal.py`).
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dpo_cache.errors import CacheError, StorageError
from dpo_cache.log import log_remark
from dpo_cache.store.cache import Cache
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.upkeep.contents import classify
from dpo_cache.store.upkeep.named_files import NamedFiles, read_named_files
from dpo_cache.store.upkeep.open_runs import (
    PATTERN,
    is_at_work,
    read_record,
    run_of,
    runs_in_audit,
    shards_of_runs,
)
from dpo_cache.store.upkeep.removal import (
    name_before_hiding,
    put_back_needed,
    removal_order,
    remove_unneeded,
)
from dpo_cache.store.upkeep.repair import QUARANTINE
from dpo_cache.store.upkeep.unused_scores import UnusedScores, find_unused_scores, publish_used_rows

GRACE_S = 86_400.0
RUN_FILE = re.compile(rf"(references/[0-9a-f]{{64}})/{PATTERN.pattern}")


@dataclass(frozen=True)
class Garbage:
    """A file that nothing needs, and why. With `unused_rows` only these rows are removed: the others are
    published as a new file first.
    """

    file: str
    bytes: int
    why: str
    unused_rows: int | None = None
    is_unused: bool = False  # scores that no pair set holds, of a reference that a manifest may name


@dataclass
class Unneeded:
    """Files that nothing needs: garbage, and those that are too recent to be sure."""

    garbage: list[Garbage] = field(default_factory=list)
    recent: list[Garbage] = field(default_factory=list)


def find_garbage(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> list[Garbage]:
    """Parts that no manifest names; references that no pair set was scored by and that are not in `keep`
    (ids, their first characters, or pair sets); scratch of killed writers; files set aside by `verify
    --repair`; with `scores` also the scores of completions that no pair set holds.

    Files written less than `grace_s` seconds ago are left out. Raises `CorruptShardError` where a manifest is
    damaged, because its parts are unknown.
    """
    return find_unneeded(cache, keep=keep, scores=scores, grace_s=grace_s).garbage


def find_unneeded(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> Unneeded:
    """The same, and the files that are left out only because they are recent.

    Where this user cannot read a manifest, all that it may need stays, with a remark.
    """
    folder = cache.folder
    files, named = folder.files(), read_named_files(folder)  # in this order: what appears later is not listed
    if named.unreadable:
        _log_unreadable(folder, named)
    kept = {*named.references, *_kept_references(cache, keep, named)}
    found, unneeded = Unneeded(), dict[str, list[Garbage]]()
    for file, size in files.items():
        kind, parts = classify(file)
        if kind == "part" and not named.may_need(file):
            _add(found, folder, [Garbage(file, size, "no manifest names it")], grace_s)
        elif kind in ("reference", "shard") and parts[0] not in kept and not named.may_need(file):
            entry = Garbage(file, size, "no pair set was scored by its reference")
            unneeded.setdefault(parts[0], []).append(entry)
    for reference_id, entries in unneeded.items():
        if _has_run(folder, reference_id):
            log_remark(
                f"{folder}: the {len(entries)} files of reference {reference_id[:12]} stay: a run of "
                "`dpo-cache precompute` is at work on them, or was killed in its audit (then give its "
                "command again)."
            )
        else:
            _add(found, folder, entries, grace_s)
    for reference_id in sorted(kept) if scores and not named.unreadable else ():
        for unused in find_unused_scores(folder, reference_id, named.manifests):
            _add(found, folder, [_garbage_of(unused)], grace_s)
    for entry in _hidden_garbage(folder, named):
        _add(found, folder, [entry], grace_s)
    return found


def collect_garbage(
    cache: Cache, *, keep: Sequence[str] = (), scores: bool = False, grace_s: float = GRACE_S
) -> list[Garbage]:
    """Remove the files that `find_garbage` finds twice in a row: a file that is needed by then stays. Returns
    the removed ones.

    Files of other users that this one may not remove stay, with a remark.
    """
    folder = cache.folder
    put_back_needed(folder, folder.hidden())
    planned = find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s)
    again = find_garbage(cache, keep=keep, scores=scores, grace_s=grace_s)
    going = sorted({*planned} & {*again}, key=lambda entry: removal_order(entry.file))
    publish_used_rows(folder, [entry.file for entry in going if entry.unused_rows is not None])
    always = [entry.file for entry in going if entry.is_unused]
    removed = remove_unneeded(folder, [entry.file for entry in going], always=always)
    removed.log(folder)
    files = {*removed.files}
    return [entry for entry in going if entry.file in files]


def _kept_references(cache: Cache, keep: Sequence[str], named: NamedFiles) -> set[str]:
    """Ids of the references in `keep`, of which some are pair sets."""
    pair_sets = named.manifests
    return {
        cache.find_reference(name)
        for name in keep
        if not any(pair_set == name or pair_set.startswith(f"{name}/") for pair_set in pair_sets)
    }


def _add(found: Unneeded, folder: Folder, entries: Sequence[Garbage], grace_s: float) -> None:
    """Add files that go together: all of them are recent if one is."""
    is_recent = any(_is_young(folder, entry.file, grace_s) for entry in entries)
    (found.recent if is_recent else found.garbage).extend(entries)


def _has_run(folder: Folder, reference_id: str) -> bool:
    """Return whether a run of `precompute` is at work under the reference, or was killed in its audit."""
    try:
        return bool(shards_of_runs(folder, reference_id))
    except StorageError:  # another user's record, which this one may not read
        return True


def _is_young(folder: Folder, file: str, grace_s: float) -> bool:
    """Return whether a writer may be about to need the file. Without a time of its own, a file is young
    unless `grace_s` is 0.
    """
    if grace_s <= 0:
        return False
    modified = folder.modified(file)
    return modified is None or time.time() - modified < grace_s


def _hidden_garbage(folder: Folder, named: NamedFiles) -> Iterator[Garbage]:
    in_audit = functools.cache(functools.partial(runs_in_audit, folder))
    for file, size in folder.hidden().items():
        before = name_before_hiding(file)
        if file.startswith(f"{QUARANTINE}/"):
            yield Garbage(file, size, "set aside by `dpo-cache verify --repair`")
        elif file.endswith(".tmp") and ("/" not in file or file.startswith(("references/", "pairs/"))):
            yield Garbage(file, size, "temporary file of a writer that was killed")
        elif before and not named.may_need(before):
            yield Garbage(file, size, "left by a removal that was killed")
        elif (found := RUN_FILE.fullmatch(file)) and (why := _why_ended(folder, file, found[1], in_audit)):
            yield Garbage(file, size, why)


def _why_ended(folder: Folder, record: str, reference: str, in_audit: Callable[[str], set[str]]) -> str:
    """Why a run's record is no longer needed; empty for one that is. The records of a run that was killed in
    an audit, and of its workers, are needed by the next run, as long as the reference has an entry.
    """
    try:
        content = read_record(folder, record)
    except CacheError:  # `verify` reports it
        return ""
    if is_at_work(folder, record, content):
        return ""
    if run_of(record) not in in_audit(reference):
        return "the record of a run that was killed"
    has_entry = folder.exists(f"{reference}/reference.json")
    return "" if has_entry else "the record of a run whose reference was removed"


def _garbage_of(unused: UnusedScores) -> Garbage:
    if unused.num_unused == unused.num_rows:
        why = f"no pair set holds its {unused.num_unused} completions"
        return Garbage(unused.shard, unused.bytes, why, is_unused=True)
    why = f"no pair set holds {unused.num_unused} of its {unused.num_rows} completions (the rest is kept)"
    num_bytes = unused.bytes * unused.num_unused // unused.num_rows
    return Garbage(unused.shard, num_bytes, why, unused.num_unused, is_unused=True)


def _log_unreadable(folder: Folder, named: NamedFiles) -> None:
    place, why = next(iter(named.unreadable.items()))
    log_remark(
        f"{folder}: the manifests of {len(named.unreadable)} pair sets or folders cannot be read, such as "
        f"{place}: {why}\nSo all references stay, and the parts in these folders."
    )
