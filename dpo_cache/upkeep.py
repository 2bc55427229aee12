"""The commands that check, clean up and copy caches, as functions.

dpo_cache.verify("cache").is_whole
dpo_cache.merge(["a", "b"], "all")
dpo_cache.push("cache", "s3://bucket/cache")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from dpo_cache.log import Log, keeps_remarks
from dpo_cache.options.keywords import keywords_of, make_options
from dpo_cache.options.upkeep import (
    CompactOptions,
    CopyOptions,
    MergeOptions,
    PullOptions,
    PushOptions,
    VerifyOptions,
    parse_share,
)
from dpo_cache.progress import show_bytes, show_transfer, shows_progress
from dpo_cache.store import open_cache
from dpo_cache.store.upkeep.compact import Compacted, compact_reference
from dpo_cache.store.upkeep.copy import TransferProgress, TransferReport, copy_cache
from dpo_cache.store.upkeep.merge import MergeReport, merge_caches
from dpo_cache.store.upkeep.problems import VerifyReport
from dpo_cache.store.upkeep.repair import repair_cache
from dpo_cache.store.upkeep.verify import verify_cache

Location = str | os.PathLike[str]
OnBytes = Callable[[int, int], None]  # bytes done, bytes in total
OnTransfer = Callable[[TransferProgress], None]


@keywords_of(VerifyOptions)
@shows_progress("verifying", show_bytes)
@keeps_remarks
def verify(
    cache: Location, *, on_progress: OnBytes | None = None, log: Log | None = None, **options: Any
) -> VerifyReport:
    """Check every byte of a cache, and that its files agree with each other.

    If something is wrong, `report.is_whole` is False, and `report.problems` names each file, what was
    expected, what was found, and what to do. With `repair` bad files are moved aside, and `report.repair`
    lists them; files that could not be read are left. With `subset`, such as `10%`, so many of the files are
    read, and others the next time. With `rescore` and `model` some completions are scored again, and
    `report.rescored` compares them with the cache.

    Problems raise nothing. Raises `FormatError` if there is no cache, and `ModelError` if the model is not
    the reference: then nothing is returned, and files that were moved aside stay there.
    """
    chosen = make_options(VerifyOptions, {"cache": cache, **options}, log)
    report = check_files(chosen, on_progress)
    add_rescored(report, chosen, log)
    return report


def check_files(options: VerifyOptions, on_progress: OnBytes | None) -> VerifyReport:
    """The first part of `verify`: check every file and, with `repair`, move bad ones aside."""
    share = None if options.subset is None else parse_share(options.subset)
    report = verify_cache(options.cache, subset=share, on_progress=on_progress)
    if options.repair and not report.is_whole:
        report.repair = repair_cache(options.cache, report)
    return report


def add_rescored(report: VerifyReport, options: VerifyOptions, log: Log | None) -> None:
    """The second part of `verify`: with `rescore`, score some completions again."""
    if options.rescore is None or options.model is None:
        return
    from dpo_cache.precomputing.rescore import rescore  # imports torch

    report.rescored = rescore(
        options.cache,
        options.model,
        options.rescore,
        revision=options.revision,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        log=log,
    )


@keywords_of(CompactOptions)
def compact(cache: Location, **options: Any) -> list[Compacted]:
    """Merge many score shards into few large ones: one entry of the result for each reference.

    Other processes may read and write during this. A crash loses nothing; a compact cache is not changed.
    Raises `CorruptShardError` for a damaged shard.
    """
    chosen = make_options(CompactOptions, {"cache": cache, **options})
    opened = open_cache(chosen.cache)
    references = [opened.find_reference(chosen.reference)] if chosen.reference else opened.references()
    return [compact_reference(opened, reference_id) for reference_id in references]


@keywords_of(MergeOptions)
@shows_progress("merging", show_bytes)
def merge(
    sources: Location | Sequence[Location],
    destination: Location,
    *,
    on_progress: OnBytes | None = None,
    **options: Any,
) -> MergeReport:
    """Copy everything that the destination lacks from the sources. A missing destination is created.

    The order of the sources does not matter, and a second merge copies nothing. Pair sets of one name with
    different pairs raise `CacheError` before anything is copied, unless `prefer` or `rename` decides; so do
    values of one completion that differ by more than rounding, unless `prefer` decides. Raises
    `CorruptShardError` for a damaged file.
    """
    several = [sources] if isinstance(sources, (str, os.PathLike)) else sources
    given = {"sources": tuple(os.fspath(source) for source in several), "destination": destination, **options}
    chosen = make_options(MergeOptions, given)
    return merge_caches(
        chosen.sources,
        chosen.destination,
        prefer=chosen.prefer,
        rename=chosen.rename,
        on_progress=on_progress,
    )


@keywords_of(PushOptions)
@shows_progress("pushing", show_transfer)
def push(
    local: Location, remote: str, *, on_progress: OnTransfer | None = None, **options: Any
) -> TransferReport:
    """Copy a local cache, or some of it, to a remote one, such as `s3://bucket/cache`.

    Only files that are missing there are sent, each checked against its digest. Interrupted copies resume:
    make the same call again. Raises `CacheError` before anything is sent if the target holds other pairs
    under the same name.
    """
    chosen = make_options(PushOptions, {"local": local, "remote": remote, **options})
    return _copy(chosen, chosen.local, chosen.remote, on_progress)


@keywords_of(PullOptions)
@shows_progress("pulling", show_transfer)
def pull(
    remote: str, local: Location, *, on_progress: OnTransfer | None = None, **options: Any
) -> TransferReport:
    """Copy a remote cache, or some of it, to a local folder, which is created if it does not exist.

    See `push`, which copies in the other direction.
    """
    chosen = make_options(PullOptions, {"remote": remote, "local": local, **options})
    return _copy(chosen, chosen.remote, chosen.local, on_progress)


def _copy(options: CopyOptions, source: str, target: str, on_progress: OnTransfer | None) -> TransferReport:
    return copy_cache(
        open_cache(source),
        open_cache(target, create=True),
        pairs=options.pairs,
        references=options.reference,
        overwrite=options.overwrite,
        on_progress=on_progress,
    )
