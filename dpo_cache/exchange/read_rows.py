"""Rows with reference log-probs made elsewhere -> pairs with scores, each value checked.

    ref_chosen_logps, ref_rejected_logps               a number a row: sums over the answer's tokens, in nats
    ref_chosen_token_logps, ref_rejected_token_logps   a list a row, one number a token; the sums may then be
                                                       missing

next to text in any format that `precompute` reads, or next to token ids:

    prompt_ids, chosen_ids, rejected_ids               lists of whole numbers
    rejected_prompt_ids                                where the prompt of rejected is another one
    row                                                the pair's row number, where the rows have numbers of
                                                       their own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.errors import DataError
from dpo_cache.types import Completion, Pair, Score, TokenIds, split_lists

SUMS = ("ref_chosen_logps", "ref_rejected_logps")
TOKEN_LOGPS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
WINDOW_ROWS = 4096
ROUNDING = 1e-4  # nats a log-prob may be above 0
SUM_TOLERANCE = (1e-2, 1e-3)  # nats, and relative, between a sum in half precision and the sum of its tokens

NO_TOKENS = np.empty(0, np.float32)


class Entry(NamedTuple):
    """What became of one row: a pair with its scores, or a row that makes none, or a problem that stops the
    import.

    `outcome.row` is the row's place in the data; the pair's own row number may be another one.
    """

    outcome: data.Outcome
    scores: tuple[Score, Score] | None
    problem: str | None


@dataclass(frozen=True)
class ImportedRows:
    """One split of the data; iterating gives an entry a row, in order, read again each time."""

    rows: Dataset
    data_format: str
    tokenizer: PreTrainedTokenizerBase | None  # None: the rows hold token ids
    truncation: data.Truncation
    place: str

    @property
    def has_token_logps(self) -> bool:
        return set(TOKEN_LOGPS) <= set(self.rows.column_names)

    def __iter__(self) -> Iterator[Entry]:
        wanted = [name for name in (*SUMS, *TOKEN_LOGPS) if name in self.rows.column_names]
        values = self.rows.select_columns(wanted)
        for first, outcomes in self._windows():
            columns = values[first : first + len(outcomes)]
            for place, outcome in enumerate(outcomes):
                if isinstance(outcome, str):
                    yield Entry(
                        data.Outcome(first + place, data.Dropped(outcome), False, False), None, outcome
                    )
                else:
                    yield _make_entry(
                        outcome,
                        {name: column[place] for name, column in columns.items()},
                        self.has_token_logps,
                    )

    def _windows(self) -> Iterator[tuple[int, list[data.Outcome | str]]]:
        """Number of the first row of each window, and what its rows make, or what is wrong with them."""
        if self.tokenizer is None:
            for first in range(0, len(self.rows), WINDOW_ROWS):
                yield first, _pairs_of_ids(self.rows, first, self.truncation)
            return
        tokenized = data.tokenized_windows(
            self.rows,
            self.data_format,
            self.tokenizer,
            window_rows=WINDOW_ROWS,
            spool=Path(),
            place=self.place,
        )
        for number, window in enumerate(tokenized):
            yield number * WINDOW_ROWS, list(data.make_pairs(window, self.truncation))


def check_columns(columns: Sequence[str], place: str) -> None:
    """Raise `DataError` where the log-probs are not there."""
    missing = [
        name
        for name, other in zip(SUMS, TOKEN_LOGPS, strict=True)
        if name not in columns and other not in columns
    ]
    if not missing:
        return
    alike = [name for name in columns if "logp" in name.lower()]
    raise DataError(
        f"{place} has no column {' or '.join(missing)}, but {', '.join(alike or columns)}.\n"
        "Name the columns that hold sums of log-probs with `map`, for example `map` "
        f"{missing[0]}={alike[0] if alike else 'COLUMN'}."
    )


def _pairs_of_ids(rows: Dataset, first: int, truncation: data.Truncation) -> list[data.Outcome | str]:
    names = [name for name in (*ID_COLUMNS, "rejected_prompt_ids", "row") if name in rows.column_names]
    table: pa.Table = rows.select_columns(names).with_format("arrow")[first : first + WINDOW_ROWS]
    has_rows = "row" in names and pa.types.is_integer(table.schema.field("row").type)
    numbers = table.column("row").to_pylist() if has_rows else range(first, first + len(table))
    lists = [_id_lists(table.column(name)) for name in names if name != "row"]
    own = lists[3] if len(lists) > 3 else lists[0]
    has_own = (
        table.column("rejected_prompt_ids").is_valid().to_pylist() if len(lists) > 3 else [False] * len(table)
    )
    return [
        _pair_of_ids(first + place, number, arrays, other if is_own else arrays[0], truncation)
        for place, (number, arrays, other, is_own) in enumerate(
            zip(numbers, zip(*lists[:3], strict=True), own, has_own, strict=True)
        )
    ]


def _pair_of_ids(
    place: int, row: int, arrays: Sequence[TokenIds | None], own: TokenIds | None, truncation: data.Truncation
) -> data.Outcome | str:
    """The outcome of the row at this place of the data, or what is wrong with its token ids."""
    for name, ids in zip((*ID_COLUMNS, "rejected_prompt_ids"), (*arrays, own), strict=True):
        if ids is None:
            return f"`{name}` is not a list of token ids"
    prompt, chosen, rejected = arrays
    assert prompt is not None and chosen is not None and rejected is not None and own is not None
    if np.array_equal(own, prompt):
        return data.Outcome(place, *data.make_pair(row, prompt, chosen, rejected, truncation), False)
    if not all(map(len, (prompt, chosen, rejected, own))):
        return "a list of token ids is empty"
    pair = Pair(row, Completion(prompt, chosen), Completion(own, rejected))
    if max(len(pair.chosen), len(pair.rejected)) > truncation.max_length:
        return "it is longer than `max_length`, but its two prompts are cut already"
    return data.Outcome(place, pair, False, False)


def _id_lists(column: pa.ChunkedArray) -> list[TokenIds | None]:
    """Token ids of each row; None for what is no list of whole numbers from 0 to 2^32 - 1."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(
        kind.value_type
    ):
        return [None] * len(column)
    if any(chunk.values.null_count for chunk in column.chunks):
        return [
            None if row is None or None in row else _in_range(np.array(row, np.int64))
            for row in column.to_pylist()
        ]
    return [
        _in_range(ids) if is_valid else None
        for ids, is_valid in zip(split_lists(column), column.is_valid().to_pylist(), strict=True)
    ]


def _in_range(ids: np.ndarray) -> TokenIds | None:
    return ids.astype(np.uint32) if not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < 2**32 else None


def _make_entry(outcome: data.Outcome, values: dict[str, Any], has_token_logps: bool) -> Entry:
    pair = outcome.pair
    if not isinstance(pair, Pair):
        return Entry(outcome, None, None)
    scores = []
    for completion, sum_name, tokens_name in zip(
        (pair.chosen, pair.rejected), SUMS, TOKEN_LOGPS, strict=True
    ):
        score = (
            _token_score(completion, values, sum_name, tokens_name)
            if has_token_logps
            else _sum_score(values[sum_name], sum_name)
        )
        if isinstance(score, str):
            return Entry(outcome, None, score)
        scores.append(score)
    return Entry(outcome, (scores[0], scores[1]), None)


def _sum_score(value: Any, name: str) -> Score | str:
    problem = _problem_of(value, name)
    return problem or Score(NO_TOKENS, float(value))


def _token_score(completion: Completion, values: dict[str, Any], sum_name: str, name: str) -> Score | str:
    """The score of a list of log-probs; the row's sum, if there is one, must be theirs."""
    tokens = values[name]
    if not isinstance(tokens, list):
        return (
            f"`{name}` is {'missing' if tokens is None else f'a {type(tokens).__name__}'}, expected a "
            "list of numbers"
        )
    if len(tokens) != completion.num_tokens:
        return f"`{name}` has another number of values than the answer has tokens"
    problem = next((found for value in tokens if (found := _problem_of(value, name))), None)
    if problem:
        return problem
    score = Score(np.array(tokens, np.float32))
    if sum_name in values:
        given = values[sum_name]
        if found := _problem_of(given, sum_name):
            return found
        absolute, relative = SUM_TOLERANCE
        if abs(given - score.logps) > absolute + relative * abs(score.logps):
            return f"`{sum_name}` is not the sum of `{name}`"
    return score


def _problem_of(value: Any, name: str) -> str | None:
    if value is None:
        return f"`{name}` is missing"
    if isinstance(value, list):
        return (
            f"`{name}` is a list, expected a sum (values per token go into "
            f"`{name.replace('_logps', '_token_logps')}`)"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"`{name}` is a {type(value).__name__}, expected a number"
    if not np.isfinite(value):
        return f"`{name}` is NaN or infinite"
    return f"`{name}` is above 0, which no log-prob is" if value > ROUNDING else None
