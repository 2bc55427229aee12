"""Scores in the cache -> a pair set: each pair joined with the log-probs of its two answers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.files.locations import data_files, expanded
from dpo_cache.log import Log
from dpo_cache.precomputing.audit import AuditTotals
from dpo_cache.precomputing.inputs import Inputs
from dpo_cache.precomputing.reference import Reference, Target
from dpo_cache.precomputing.template_days import describe_day
from dpo_cache.precomputing.windows import SplitPlan
from dpo_cache.store import Cache, PairSet
from dpo_cache.store.format.documents import Document, digest_json
from dpo_cache.store.replacing import (
    check_replaceable,
    describe_replacement,
    differing_settings,
    has_same_pairs,
    renewed_manifest,
)
from dpo_cache.store.upkeep.run_record import RunRecord
from dpo_cache.types import ScoredPair


def check_names(
    inputs: Inputs, splits: Sequence[SplitPlan], name: str, target: Target, *, are_planned: bool
) -> None:
    """Raise `CacheError` if the cache has a pair set of that name that may not be replaced; see
    `check_replaceable`.

    Before the splits are planned, their pairs are unknown, so a pair set from another source counts as one
    with other pairs.
    """
    for split in splits:
        details = describe_split(inputs, split, name, target.reference, {}, None)
        if not are_planned:
            del details["pairs_digest"]
        _check_replaceable(target, details, overwrite=inputs.options.overwrite)


def publish_pair_set(
    split: SplitPlan,
    target: Target,
    truncation: data.Truncation,
    details: Document,
    record: RunRecord,
    log: Log,
    *,
    overwrite: bool,
) -> int:
    """Publish the split's pairs with their scores. If the cache already has the pairs, publish only settings
    that differ.

    `details` go into the manifest, see `describe_split`; the `record` is written first. Returns the bytes
    written. Raises `CacheError` if another run has published another pair set of that name meanwhile, unless
    `overwrite`.
    """
    cache, reference = target.cache, target.reference
    # the entry may be missing: `verify --repair` moves damaged ones aside
    cache.publish_reference(reference.identity, reference.provenance)
    pair_set = split.survey.pair_set
    if cache.holds_pairs(pair_set):
        old = cache.pairs(pair_set)
        _check_replaceable(target, details, overwrite=overwrite)
        if has_same_pairs(old, details) and old.is_complete():
            written = _renew_settings(cache, old, details, record, log)
            if old.has_parts():  # otherwise another process removed them before this manifest was published
                return written
        log(describe_replacement(cache, old, details, reference.identity))
    writer = cache.write_pairs(details["name"], details["split"])
    for window in split.windows:
        pairs = data.kept_pairs(window.rows, truncation)
        scores = target.scores.fetch(np.concatenate([window.chosen_keys, window.rejected_keys]))
        chosen, rejected = scores[: len(pairs)], scores[len(pairs) :]
        writer.add([ScoredPair(*entry) for entry in zip(pairs, chosen, rejected, strict=True)])
    record.add_pair_set(pair_set, details)
    writer.finish(details)
    # again: another process may have removed the entry before the manifest named it
    cache.publish_reference(reference.identity, reference.provenance)
    return writer.bytes_written


def describe_split(
    inputs: Inputs,
    split: SplitPlan,
    name: str,
    reference: Reference,
    tokenization: Document,
    audited: AuditTotals | None,
) -> Document:
    """The manifest's details: the source of the pairs, its conversion into pairs, and the audit of the run so
    far.
    """
    options, survey = inputs.options, split.survey
    in_memory = {} if inputs.rows is None else {"rows_of": "memory"}  # then `dataset` is no path
    source = {
        "dataset": absolute(options.dataset) if inputs.rows is None else options.dataset,
        "format": survey.data_format,
        "map": list(options.map),
        "ranked_pairs": options.ranked_pairs,
        "rows_read": survey.rows_read,
        "rows_dropped": {reason: finding.count for reason, finding in survey.dropped.items()},
        **({"on_error": "drop"} if options.on_error == "drop" else {}),
        **({"early_answers": options.early_answers} if survey.starts_early else {}),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **in_memory,
    }
    return {
        "name": name,
        "split": split.name,
        "reference": reference.id,
        "pairs_digest": split.digest.hexdigest(),
        "source": source,
        "tokenization": {**tokenization, **describe_day(split.template_date)},
        **({"audit": audited.as_document()} if audited and audited.completions else {}),
    }


def describe_tokenization(inputs: Inputs, tokenizer: PreTrainedTokenizerBase, location: str) -> Document:
    """The manifest's account of the tokenizer and the truncation."""
    options = inputs.options
    return {
        "tokenizer": absolute(location),
        "tokenizer_sha256": data.tokenizer_digest(tokenizer),
        "chat_template": tokenizer.chat_template,
        "max_length": options.max_length,
        "truncation": options.truncation,
        "max_prompt_length": options.max_prompt_length,
    }


def absolute(location: str) -> str:
    """The absolute form of an existing path, or of a pattern of such paths; a Hub id stays unchanged."""
    path = str(expanded(location))
    return os.path.abspath(path) if os.path.exists(path) or data_files(location) else location


def _check_replaceable(target: Target, details: Document, *, overwrite: bool) -> None:
    cache, reference = target.cache, target.reference
    name = f"{details['name']}/{details['split']}"
    former_id = None
    if reference.former is not None and not overwrite and cache.holds_pairs(name):
        is_other = cache.pairs(name).reference_id != reference.id
        former_id = digest_json(reference.former()) if is_other else None
    check_replaceable(cache, details, reference.identity, overwrite=overwrite, former_id=former_id)


def _renew_settings(cache: Cache, old: PairSet, details: Document, record: RunRecord, log: Log) -> int:
    """Publish the details with the existing parts, if a setting differs. Returns the bytes written."""
    differing = differing_settings(old, details)
    if not differing:
        return 0
    log(f"pair set {old.name} has the same pairs, with other settings now: {'; '.join(differing)}.")
    record.add_pair_set(old.name, details)
    return cache.publish_manifest(renewed_manifest(old, details))
