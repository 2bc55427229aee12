"""Log-probs that another program computed -> a pair set under a reference that the user names.

read and check every row -> name the reference by the values -> publish pairs

The reference's identity is `{"imported": NAME, "dtype": DTYPE or null, "values": sha256}` over row,
completion keys and sums of all pairs: two imports under one name are one reference only if they are the same
import. Such a reference has no scores folder: its values are only in its pair sets.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.data.survey import rows_by_reason
from dpo_cache.errors import DataError, OptionError
from dpo_cache.exchange.findings import ValueFindings
from dpo_cache.exchange.read_rows import ID_COLUMNS, SUMS, ImportedRows, check_columns
from dpo_cache.lm.model.load import load_config
from dpo_cache.log import Log, keeps_remarks, log_remark
from dpo_cache.options.exchange import ImportOptions
from dpo_cache.options.keywords import keywords_of, make_options
from dpo_cache.options.precompute import renamed_columns
from dpo_cache.progress import bars_hidden
from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.cache import check_name
from dpo_cache.store.format.documents import Document, digest_json
from dpo_cache.store.format.pair_tables import PairsDigest
from dpo_cache.types import Pair, ScoredPair

BATCH_PAIRS = 2048
UNCUT = 2**31 - 1  # tokens: no `max_length`


@dataclass
class ImportReport:
    """What `import_pairs` did; counts are sums over the splits."""

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


@dataclass
class _Split:
    """A split on its way in: its rows, and what was found in them."""

    name: str
    rows: ImportedRows
    survey: data.Survey
    digest: PairsDigest = field(default_factory=PairsDigest)
    has_own_prompts: bool = False
    problems: list[tuple[int, str]] = field(default_factory=list)


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

    Every row is read and checked before anything is written. `log` gets each remark (default: the logger
    `dpo_cache`); the report lists them, too. Raises `DpoCacheError`: `DataError` names each unusable row.
    """
    given = {"cache": cache, "dataset": dataset, "reference": reference, **options}
    chosen = make_options(ImportOptions, given, log)
    return _Import(chosen, log or log_remark).run()


class _Import:
    """One import: its options, and what its splits have in common."""

    def __init__(self, options: ImportOptions, log: Log):
        self.options, self.log = options, log
        self.name = check_name(options.name or data.dataset_name(options.dataset))
        self.cache: Cache = open_cache(options.cache, create=True)
        self.report = ImportReport(cache=str(self.cache), start_from=_absolute(options.model))
        self.values = hashlib.sha256(b"dpo-cache imported values/1")
        self.findings = ValueFindings()

    def run(self) -> ImportReport:
        splits = self._open_splits()
        for split in splits:
            self._check(split)
        self._remark(splits)
        identity = {
            "imported": self.options.reference,
            "dtype": self._dtype(),
            "values": self.values.hexdigest(),
        }
        self.report.reference = digest_json(identity)
        self.cache.publish_reference(identity, self._provenance())
        for split in splits:
            self._publish(split)
        return self.report

    # -- rows ------------------------------------------------------------------------------------------

    def _open_splits(self) -> list[_Split]:
        options = self.options
        tables = data.read_dataset(options.dataset, options.split, rename=renamed_columns(options.map))
        formats = {
            name: self._format_of(rows, f"{options.dataset}: split {name}") for name, rows in tables.items()
        }
        self.report.format = ", ".join(sorted(set(formats.values())))
        self.tokenizer = self._load_tokenizer(needed=set(formats.values()) != {"ids"})
        splits = []
        for name, rows in tables.items():
            assert isinstance(rows, Dataset)
            data_format = formats[name]
            tokenizer = None if data_format == "ids" else self.tokenizer
            truncation = data.Truncation(
                options.max_length or (UNCUT if data_format == "ids" else 1024),
                options.truncation,
                options.max_prompt_length,
            )
            imported = ImportedRows(
                rows, data_format, tokenizer, truncation, f"{options.dataset}: split {name}"
            )
            splits.append(_Split(check_name(name), imported, data.Survey(f"{self.name}/{name}", data_format)))
        if len({split.rows.has_token_logps for split in splits}) > 1:
            raise DataError(
                f"{options.dataset}: some splits have log-probs per token, others do not.\n"
                "Import them one by one, with `split`."
            )
        self.report.has_token_logps = splits[0].rows.has_token_logps
        return splits

    def _format_of(self, rows: data.Rows, place: str) -> str:
        first = data.first_row(rows, place)
        columns, wanted = list(rows.column_names or first), self.options.format
        check_columns(columns, place)
        has_ids = set(ID_COLUMNS) <= set(columns)
        if wanted == "ids" and not has_ids:
            raise DataError(
                f"`format` ids needs the columns {', '.join(ID_COLUMNS)}; {place} has "
                f"{', '.join(columns)}.\nName them with `map`."
            )
        if wanted == "ids" or (wanted == "auto" and has_ids):
            return "ids"
        data_format = (
            data.detect_format(columns, first, place)
            if wanted == "auto"
            else data.check_format(wanted, columns, place)
        )
        if data_format == "ranked":
            raise DataError(
                f"{place}: ranked answers cannot be imported, {' and '.join(SUMS)} name two answers.\n"
                "Write one row a pair."
            )
        return data_format

    def _load_tokenizer(self, *, needed: bool) -> PreTrainedTokenizerBase | None:
        options = self.options
        location = options.tokenizer or options.model
        if location is None:
            if needed:
                raise OptionError(
                    "`tokenizer` (or `model`) is needed: the data holds text, and the log-probs are those "
                    "of token ids."
                )
            return None
        return data.load_tokenizer(
            location, chat_template=options.chat_template, trust_remote_code=options.trust_remote_code
        )

    # -- every value checked ---------------------------------------------------------------------------

    def _check(self, split: _Split) -> None:
        """Read the split once; what it holds goes into its survey, and into the name of the reference."""
        vocabulary = self._vocabulary()
        for outcome, scores, problem in split.rows:
            row, pair = outcome.row, outcome.pair
            if problem is None:
                split.survey.add(outcome)
            if problem is None and isinstance(pair, Pair):
                largest = int(
                    max(ids.max() for ids in (pair.chosen.sequence_ids, pair.rejected.sequence_ids))
                )
                problem = (
                    f"token id {largest} is beyond the {vocabulary} of the model"
                    if vocabulary and largest >= vocabulary
                    else None
                )
            if problem is not None:
                split.problems.append((row, problem))
                continue
            if not isinstance(pair, Pair) or scores is None:
                continue
            keys = completion_key(pair.chosen), completion_key(pair.rejected)
            split.digest.add(pair.row, *keys)
            self.values.update(
                struct.pack("<q", pair.row)
                + keys[0]
                + keys[1]
                + struct.pack("<dd", *(score.logps for score in scores))
            )
            split.has_own_prompts |= not np.array_equal(pair.chosen.prompt_ids, pair.rejected.prompt_ids)
            self.findings.add(
                row,
                keys,
                (pair.chosen.num_tokens, pair.rejected.num_tokens),
                (scores[0].logps, scores[1].logps),
            )
        _raise_problems(split)
        if not split.survey.pairs_kept:
            reasons = ", ".join(
                f"{reason} ({finding.count})" for reason, finding in split.survey.dropped.items()
            )
            raise DataError(f"no row of {split.rows.place} makes a pair: {reasons}.")

    def _vocabulary(self) -> int | None:
        """Embeddings of the model, where one is named."""
        if self.options.model is None:
            return None
        return (
            load_config(self.options.model, revision=None, trust_remote_code=self.options.trust_remote_code)
            .get_text_config()
            .vocab_size
        )

    def _remark(self, splits: list[_Split]) -> None:
        """Say what may be wrong with values that are well-formed."""
        for split in splits:
            survey, place = split.survey, split.rows.place
            if survey.truncated.count:
                length = split.rows.truncation.max_length
                self.log(
                    f"{place}: {_rows_found(survey.truncated)} cut to `max_length` {length}; "
                    "their imported values are right only if they were computed on the same cut."
                )
        for warning in self.findings.warnings():
            self.log(warning)
        if self.options.model is None:
            self.log(
                "no `model`: training cannot start from the reference by default, and needs `model` itself."
            )

    # -- publishing ------------------------------------------------------------------------------------

    def _publish(self, split: _Split) -> None:
        report, survey, digest = self.report, split.survey, split.digest.hexdigest()
        self._add_to_report(split)
        if self.cache.holds_pairs(survey.pair_set):  # by its name: a listing may lag behind
            old = self.cache.pairs(survey.pair_set)
            if (old.reference_id, old.manifest.get("pairs_digest")) == (
                report.reference,
                digest,
            ) and old.is_complete():
                return
            self.log(
                f"pair set {survey.pair_set} is replaced: it held {len(old)} pairs of reference "
                f"{old.reference_id[:12]}."
            )
        writer = self.cache.write_pairs(self.name, split.name)
        pairs = (
            ScoredPair(outcome.pair, *scores)
            for outcome, scores, _ in split.rows
            if scores is not None and isinstance(outcome.pair, Pair)
        )
        while batch := list(islice(pairs, BATCH_PAIRS)):
            writer.add(batch)
        writer.finish(self._manifest_details(split, digest))
        report.bytes_written += writer.bytes_written

    def _add_to_report(self, split: _Split) -> None:
        report, survey = self.report, split.survey
        report.pair_sets.append(survey.pair_set)
        report.rows_read += survey.rows_read
        report.pairs_kept += survey.pairs_kept
        report.rows_truncated += survey.truncated.count
        for reason, finding in survey.dropped.items():
            report.dropped[reason] = report.dropped.get(reason, 0) + finding.count
        report.surveys.append(survey.as_dict())
        report.mean_logps, report.mean_token_logps = self.findings.means()

    def _manifest_details(self, split: _Split, digest: str) -> Document:
        options, survey, truncation = self.options, split.survey, split.rows.truncation
        is_local, location = os.path.exists(options.dataset), options.tokenizer or options.model
        is_uncut = truncation.max_length == UNCUT
        return {
            "name": self.name,
            "split": split.name,
            "reference": self.report.reference,
            "imported": True,
            "token_logps": split.rows.has_token_logps,
            "pairs_digest": digest,
            "source": {
                "dataset": os.path.abspath(options.dataset) if is_local else options.dataset,
                "format": survey.data_format,
                "map": list(options.map),
                "rows_read": survey.rows_read,
                "rows_dropped": {reason: finding.count for reason, finding in survey.dropped.items()},
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
            "tokenization": {
                "tokenizer": _absolute(location),
                "tokenizer_sha256": data.tokenizer_digest(self.tokenizer) if self.tokenizer else None,
                "chat_template": self.tokenizer.chat_template if self.tokenizer else None,
                "max_length": survey.longest if is_uncut else truncation.max_length,
                "truncation": "keep-end"
                if split.has_own_prompts
                else truncation.mode,  # nothing else leaves two prompts
                "max_prompt_length": truncation.max_prompt_length,
            },
        }

    def _dtype(self) -> str | None:
        return None if self.options.dtype == "unknown" else self.options.dtype

    def _provenance(self) -> Document:
        options = self.options
        is_local = os.path.exists(options.dataset)
        return {
            "model": _absolute(options.model),
            "revision": None,
            "tokenizer": _absolute(options.tokenizer or options.model),
            "imported_from": os.path.abspath(options.dataset) if is_local else options.dataset,
            "imported": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _raise_problems(split: _Split) -> None:
    """One `DataError` for all rows that cannot be used: each reason with its count and first rows."""
    if not split.problems:
        return
    one = len(split.problems) == 1
    raise DataError(
        f"{split.rows.place}: {len(split.problems)} row{'' if one else 's'} cannot be imported (rows are "
        f"counted from 0, format {split.rows.data_format}):\n{rows_by_reason(split.problems)}\n"
        "Correct or remove them and run again; nothing was written."
    )


def _rows_found(finding: Any) -> str:
    return (
        f"{finding.count} row{'s' if finding.count > 1 else ''} ({finding.shown_rows()}) "
        f"{'are' if finding.count > 1 else 'is'}"
    )


def _absolute(location: str | None) -> str | None:
    return os.path.abspath(location) if location and os.path.isdir(location) else location
