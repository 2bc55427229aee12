"""Rows of any preference data set -> token ids."""

from dpo_cache.data.deciding import deciding_row
from dpo_cache.data.examples import Example, parse_row
from dpo_cache.data.formats import (
    RANKED,
    check_format,
    columns_read,
    detect_format,
    unused_columns,
    unused_remark,
)
from dpo_cache.data.read import Rows, dataset_name, first_row, read_dataset, take_rows
from dpo_cache.data.shown_rows import ShownRow, show_rows
from dpo_cache.data.survey import Survey
from dpo_cache.data.template_date import template_date_of, writes_day
from dpo_cache.data.tokenize import tokenize_rows, tokenized_windows
from dpo_cache.data.truncate import Dropped, Outcome, Truncation, kept_pairs, make_pair, make_pairs
from dpo_cache.data.unions import nested_columns, without_union_nulls
from dpo_cache.tokenizer import load_tokenizer, set_chat_template, tokenizer_digest

__all__ = [
    "RANKED",
    "Dropped",
    "Example",
    "Outcome",
    "Rows",
    "ShownRow",
    "Survey",
    "Truncation",
    "check_format",
    "columns_read",
    "dataset_name",
    "deciding_row",
    "detect_format",
    "first_row",
    "kept_pairs",
    "load_tokenizer",
    "make_pair",
    "make_pairs",
    "nested_columns",
    "parse_row",
    "read_dataset",
    "set_chat_template",
    "show_rows",
    "take_rows",
    "template_date_of",
    "tokenize_rows",
    "tokenized_windows",
    "tokenizer_digest",
    "unused_columns",
    "unused_remark",
    "without_union_nulls",
    "writes_day",
]
