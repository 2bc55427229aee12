"""The splits of an import, opened: the format, tokenizer and truncation of each, before any row is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.data.text_rows import TextRows
from dpo_cache.errors import DataError, OptionError
from dpo_cache.exchange.read_rows import ID_COLUMNS, SUMS, ImportedRows, check_columns
from dpo_cache.log import Log
from dpo_cache.options.exchange import ImportOptions
from dpo_cache.options.precompute import renamed_columns
from dpo_cache.store.cache import Cache, check_name
from dpo_cache.store.format.pair_tables import PairsDigest

UNCUT = 2**31 - 1  # tokens: no `max_length`


@dataclass
class Split:
    """A split to import: its rows, and what is known of the rows read so far."""

    name: str
    rows: ImportedRows
    survey: data.Survey
    digest: PairsDigest = field(default_factory=PairsDigest)
    has_own_prompts: bool = False  # a prompt of rejected that differs from that of chosen
    problems: list[tuple[int, str]] = field(default_factory=list)  # row, reason


def open_splits(options: ImportOptions, name: str) -> list[Split]:
    """The splits of the data; `name` is that of the pair set. Raises `DataError` and `OptionError`."""
    tables = data.read_dataset(options.dataset, options.split, rename=renamed_columns(options.map))
    places = {split: f"{options.dataset}: split {split}" for split in tables}
    formats = {split: _find_format(rows, options.format, places[split]) for split, rows in tables.items()}
    tokenizer = _load_tokenizer(options, needed=set(formats.values()) != {"ids"})
    splits = []
    for split, rows in tables.items():
        assert isinstance(rows, (Dataset, TextRows))
        max_length = options.max_length or (UNCUT if formats[split] == "ids" else 1024)
        truncation = data.Truncation(max_length, options.truncation, options.max_prompt_length)
        imported = ImportedRows(rows, formats[split], tokenizer, truncation, places[split])
        splits.append(Split(check_name(split), imported, data.Survey(f"{name}/{split}", formats[split])))
    if len({split.rows.has_token_logps for split in splits}) > 1:
        raise DataError(
            f"{options.dataset}: some splits have log-probs per token, others do not.\n"
            "Import them one by one, with `split`."
        )
    return splits


def set_template_dates(splits: Sequence[Split], cache: Cache, given: str | None, log: Log) -> None:
    """Give splits whose chat template writes the day the one `given`, that of the first import, or today."""
    for split in splits:
        tokenizer, pair_set = split.rows.tokenizer, split.survey.pair_set
        if tokenizer is None or not data.writes_day(tokenizer):
            continue
        day = date.fromisoformat(given) if given else None
        if day is None and cache.holds_pairs(pair_set):
            day = data.template_date_of(cache.pairs(pair_set).manifest)
        split.rows = replace(split.rows, template_date=day or date.today())
        log(
            f"the chat template writes the day: {split.rows.template_date}. If the log-probs were made on "
            "another, give it as `template_date`."
        )


def _find_format(rows: data.Rows, wanted: str, place: str) -> str:
    first = data.first_row(rows, place)
    columns = list(rows.column_names or first)
    check_columns(columns, place)
    has_ids = set(ID_COLUMNS) <= set(columns)
    if wanted == "ids" and not has_ids:
        raise DataError(
            f"`format` ids needs the columns {', '.join(ID_COLUMNS)}; {place} has "
            f"{', '.join(columns)}.\nName them with `map`."
        )
    if wanted == "ids" or (wanted == "auto" and has_ids):
        return "ids"
    if wanted != "auto":
        return data.check_format(wanted, columns, place)
    data_format = data.detect_format(columns, data.deciding_row(rows, place), place)
    if data_format in data.RANKED:
        raise DataError(
            f"{place}: ranked answers cannot be imported, because {' and '.join(SUMS)} are values of two "
            "answers.\nWrite one row a pair."
        )
    return data_format


def _load_tokenizer(options: ImportOptions, *, needed: bool) -> PreTrainedTokenizerBase | None:
    location = options.tokenizer or options.model
    if location is not None:
        return data.load_tokenizer(
            location, chat_template=options.chat_template, trust_remote_code=options.trust_remote_code
        )
    if needed:
        raise OptionError(
            "`tokenizer` (or `model`) is needed: the data holds text, and the log-probs are those "
            "of token ids."
        )
    return None
