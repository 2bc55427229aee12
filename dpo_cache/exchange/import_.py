"""Log-probs that another program computed -> a pair set under a reference that the user names.

read and check every row -> name the reference by the values -> publish pairs

The reference's identity is `{"imported": NAME, "dtype": DTYPE or null, "values": sha256}`. The digest is over
row, completion keys, sums and, where there are any, log-probs of the tokens of all pairs: two imports under
one name are one reference only if they are the same import. Such a reference has no scores folder: its values
are only in its pair sets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import numpy as np

from dpo_cache import data
from dpo_cache.data.problems import unusable_rows
from dpo_cache.errors import DataError
from dpo_cache.exchange.html import import_html
from dpo_cache.exchange.import_splits import UNCUT, Split, open_splits, set_template_dates
from dpo_cache.exchange.values import ImportedValues
from dpo_cache.lm.model.load import load_config
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.options.exchange import ImportOptions
from dpo_cache.options.keywords import keywords_of, make_options
from dpo_cache.progress import bars_hidden
from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.cache import check_name
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document, digest_json
from dpo_cache.store.replacing import (
    check_replaceable,
    describe_replacement,
    differing_settings,
    has_same_pairs,
    renewed_manifest,
)
from dpo_cache.types import Pair, ScoredPair

BATCH_PAIRS = 2048


@dataclass
class ImportReport:
    """The report of `import_pairs`; counts are sums over the splits."""

    pair_sets: list[str] = field(default_factory=list)
    cache: str = ""
    reference: str = ""
    format: str = ""
    has_token_logps: bool = False
    rows_read: int = 0
    pairs_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # rows by reason
    rows_truncated: int = 0
    mean_logps: float = 0.0  # nats a completion
    mean_token_logps: float = 0.0  # nats a token
    bytes_written: int = 0
    surveys: list[dict[str, Any]] = field(default_factory=list)
    start_from: str | None = None  # the model that training starts from by default
    remarks: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<ImportReport of {', '.join(self.pair_sets)}: {self.pairs_kept:,} pairs>"

    def _repr_html_(self) -> str:
        return import_html(self)

    def add(self, survey: data.Survey) -> None:
        """Add the counts of one split."""
        self.pair_sets.append(survey.pair_set)
        self.rows_read += survey.rows_read
        self.pairs_kept += survey.pairs_kept
        for reason, finding in survey.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + finding.count
        self.rows_truncated += survey.truncated.count
        self.surveys.append(survey.as_dict())


@keywords_of(ImportOptions)
@keeps_remarks
@bars_hidden("datasets")
def import_pairs(
    cache: str | os.PathLike[str],
    dataset: str | os.PathLike[str],
    *,
    reference: str,
    log: Log | None = None,
    **options: Any,
) -> ImportReport:
    """Enter pairs whose reference log-probs were computed elsewhere, under a reference of this name.

    Every row is read and checked before anything is written. A pair set of that name is replaced if it was
    imported from the same source under the same name; another one only with `overwrite`.
    `log` gets each remark (default: the logger `dpo_cache`); the report lists them, too. Raises
    `DpoCacheError`: `DataError` names each unusable row.
    """
    given = {"cache": cache, "dataset": dataset, "reference": reference, **options}
    chosen, log = make_options(ImportOptions, given, log), log or log_remark
    name = check_name(chosen.name or data.dataset_name(chosen.dataset))
    opened = open_cache(chosen.cache, create=True)
    splits = open_splits(chosen, name)
    set_template_dates(splits, opened, chosen.template_date, log)
    opened.check_writable(f"pairs/{split.survey.pair_set}/manifest.json" for split in splits)
    values = ImportedValues(has_token_logps=splits[0].rows.has_token_logps)
    vocab_size = _vocab_size(chosen)
    for split in splits:
        _check_rows(split, values, vocab_size)
    for remark in _remarks(chosen, splits, values):
        log(remark)
    dtype = None if chosen.dtype == "unknown" else chosen.dtype
    identity = {"imported": chosen.reference, "dtype": dtype, "values": values.hexdigest()}
    described = [_describe_split(chosen, split, name, digest_json(identity)) for split in splits]
    for details in described:
        check_replaceable(opened, details, identity, overwrite=chosen.overwrite)
    report = ImportReport(
        cache=str(opened),
        reference=_publish_reference(opened, identity, _provenance(chosen), log),
        format=", ".join(sorted({split.rows.data_format for split in splits})),
        has_token_logps=splits[0].rows.has_token_logps,
        start_from=_absolute(chosen.model),
    )
    report.mean_logps, report.mean_token_logps = values.means()
    for split, details in zip(splits, described, strict=True):
        report.bytes_written += _publish(opened, split, details, identity, log)
        report.add(split.survey)
        for remark in split.survey.remarks():
            log(remark)
    # again: others may have removed the entry before a manifest named it
    opened.publish_reference(identity, _provenance(chosen))
    return report


def _check_rows(split: Split, values: ImportedValues, vocab_size: int | None) -> None:
    """Read the split once; add its rows to its survey, its digest and the values.

    Raises one `DataError` for all rows that cannot be used.
    """
    for outcome, scores, problem in split.rows:
        row, pair = outcome.row, outcome.pair
        if problem is None:
            split.survey.add(outcome)
            problem = _beyond_vocabulary(pair, vocab_size) if vocab_size and isinstance(pair, Pair) else None
        if problem is not None:
            split.problems.append((row, problem))
        elif isinstance(pair, Pair) and scores is not None:
            keys = completion_key(pair.chosen), completion_key(pair.rejected)
            split.digest.add(pair.row, *keys)
            split.has_own_prompts |= not np.array_equal(pair.chosen.prompt_ids, pair.rejected.prompt_ids)
            values.add(row, pair, keys, scores)
    if split.problems:
        raise DataError(
            unusable_rows(
                split.problems,
                split.rows.rows,
                place=split.rows.place,
                data_format=split.rows.data_format,
                verb="imported",
                remedy="Correct or remove them and run again; nothing was written.",
            )
        )
    split.survey.check_pairs()


def _beyond_vocabulary(pair: Pair, vocab_size: int) -> str | None:
    largest = max(int(side.sequence_ids.max()) for side in (pair.chosen, pair.rejected))
    return f"token id {largest} is beyond the {vocab_size} of the model" if largest >= vocab_size else None


def _vocab_size(options: ImportOptions) -> int | None:
    """Number of the model's embeddings, if a model is named."""
    if options.model is None:
        return None
    config = load_config(options.model, revision=None, trust_remote_code=options.trust_remote_code)
    return config.get_text_config().vocab_size


def _remarks(options: ImportOptions, splits: list[Split], values: ImportedValues) -> Iterator[str]:
    """Likely mistakes in well-formed values."""
    for split in splits:
        found, max_length = split.survey.truncated, split.rows.truncation.max_length
        if found.count:
            rows = f"{found.count} row{'s' if found.count > 1 else ''} ({found.shown_rows()})"
            yield (
                f"{split.rows.place}: {rows} {'are' if found.count > 1 else 'is'} cut to `max_length` "
                f"{max_length}; their imported values are right only if they were computed on the same cut."
            )
    yield from values.warnings()
    if options.model is None:
        yield "no `model`: training cannot start from the reference by default, and needs `model` itself."


def _publish_reference(cache: Cache, identity: Document, provenance: Document, log: Log) -> str:
    """Publish the reference's entry; also if it is here, but with another model than is named now."""
    reference_id = cache.publish_reference(identity, provenance)
    before = cache.read_reference(reference_id)["provenance"]
    places = [{name: origin.get(name) for name in ("model", "tokenizer")} for origin in (before, provenance)]
    if provenance["model"] is not None and places[0] != places[1]:
        cache.replace_provenance(reference_id, provenance)
        log(f"reference {reference_id[:12]} has another origin now: {'; '.join(differing_fields(*places))}.")
    return reference_id


def _publish(cache: Cache, split: Split, details: Document, identity: Document, log: Log) -> int:
    """Publish the split's pairs. If the cache has them already, publish only settings that differ. Returns
    the bytes written.
    """
    pair_set = split.survey.pair_set
    if cache.holds_pairs(pair_set):  # by its name: a listing may lag behind
        old = cache.pairs(pair_set)
        if has_same_pairs(old, details) and old.is_complete():
            differing = differing_settings(old, details)
            if not differing:
                return 0
            log(f"pair set {pair_set} has the same pairs, with other settings now: {'; '.join(differing)}.")
            written = cache.publish_manifest(renewed_manifest(old, details))
            if old.has_parts():  # else others removed them before this manifest was published
                return written
        log(describe_replacement(cache, old, details, identity))
    writer = cache.write_pairs(details["name"], split.name)
    pairs = (
        ScoredPair(outcome.pair, *scores)
        for outcome, scores, _ in split.rows
        if scores is not None and isinstance(outcome.pair, Pair)
    )
    while batch := list(islice(pairs, BATCH_PAIRS)):
        writer.add(batch)
    writer.finish(details)
    return writer.bytes_written


def _describe_split(options: ImportOptions, split: Split, name: str, reference: str) -> Document:
    """The manifest's details: the source of the pairs, and how it became pairs."""
    survey, truncation, tokenizer = split.survey, split.rows.truncation, split.rows.tokenizer
    is_uncut = truncation.max_length == UNCUT
    return {
        "name": name,
        "split": split.name,
        "reference": reference,
        "imported": True,
        "token_logps": split.rows.has_token_logps,
        "pairs_digest": split.digest.hexdigest(),
        "source": {
            "dataset": _absolute(options.dataset),
            "format": survey.data_format,
            "map": list(options.map),
            "rows_read": survey.rows_read,
            "rows_dropped": {reason: finding.count for reason, finding in survey.dropped.items()},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "tokenization": {
            "tokenizer": _absolute(options.tokenizer or options.model),
            "tokenizer_sha256": data.tokenizer_digest(tokenizer) if tokenizer else None,
            "chat_template": tokenizer.chat_template if tokenizer else None,
            "max_length": survey.longest if is_uncut else truncation.max_length,
            # no other truncation leaves two prompts
            "truncation": "keep-end" if split.has_own_prompts else truncation.mode,
            "max_prompt_length": truncation.max_prompt_length,
            **({"template_date": split.rows.template_date.isoformat()} if split.rows.template_date else {}),
        },
    }


def _provenance(options: ImportOptions) -> Document:
    return {
        "model": _absolute(options.model),
        "revision": None,
        "tokenizer": _absolute(options.tokenizer or options.model),
        "imported_from": _absolute(options.dataset),
        "imported": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _absolute(location: str | None) -> str | None:
    """A path that exists as an absolute one; a Hub id as it is."""
    return os.path.abspath(location) if location and os.path.exists(location) else location
