"""Rows of any preference data set -> token ids."""

from dpo_cache.data.formats import check_rows, detect_format
from dpo_cache.data.read import dataset_name, read_dataset
from dpo_cache.data.tokenize import load_tokenizer, tokenize_rows, tokenizer_digest
from dpo_cache.data.truncate import Dropped, Truncation, make_pair

__all__ = [
    "Dropped",
    "Truncation",
    "check_rows",
    "dataset_name",
    "detect_format",
    "load_tokenizer",
    "make_pair",
    "read_dataset",
    "tokenize_rows",
    "tokenizer_digest",
]
