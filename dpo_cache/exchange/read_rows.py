"""Rows with reference log-probs of another program -> pairs with scores, each value checked.

    ref_chosen_logps, ref_rejected_logps               a number a row: sums over the answer's tokens, in nats
    ref_chosen_token_logps, ref_rejected_token_logps   a list a row, one number a token; the sums may then be
                                                       missing

next to text in any format that `precompute` reads, or next to token ids:

    prompt_ids, chosen_ids, rejected_ids               lists of whole numbers
    rejected_prompt_ids                                where the prompt of rejected differs from chosen's
    row                                                the pair's row number, if it is not the row's position
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from dpo_cache import data
from dpo_cache.data.examples import RowProblem
from dpo_cache.data.messages import describe
from dpo_cache.data.text_rows import TextRows
from dpo_cache.errors import DataError
from dpo_cache.types import LOWEST_LOGP, Completion, Pair, Score, TokenIds, split_lists

SUMS = ("ref_chosen_logps", "ref_rejected_logps")
TOKEN_LOGPS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
WINDOW_ROWS = 4096
ROUNDING = 1e-4  # nats a log-prob may be above 0
SUM_TOLERANCE = (1e-2, 1e-3)  # nats, and relative, between a sum in half precision and the sum of its tokens

NO_TOKENS = np.empty(0, np.float32)


class Entry(NamedTuple):
    """The result of one row: a pair with its scores, a dropped row, or a problem that stops the import.

    `outcome.row` is the row's position in the data; `outcome.pair.row` may be another number.
    """

    outcome: data.Outcome
    scores: tuple[Score, Score] | None
    problem: str | None


@dataclass(frozen=True)
class ImportedRows:
    """One split of the data; each iteration reads it again and yields an entry for each row, in order."""

    rows: Dataset | TextRows
    data_format: str
    tokenizer: PreTrainedTokenizerBase | None  # always there, unless the format is ids
    truncation: data.Truncation
    place: str
    template_date: date | None = None  # the day that the chat template writes, if it writes one

    @property
    def has_token_logps(self) -> bool:
        return set(TOKEN_LOGPS) <= set(self.rows.column_names)

    def __iter__(self) -> Iterator[Entry]:
        for first, outcomes in self._windows():
            values = _values_of(self.rows, first, len(outcomes))
            for place, outcome in enumerate(outcomes):
                if isinstance(outcome, str):
                    dropped = data.Outcome(first + place, data.Dropped(outcome), False, False)
                    yield Entry(dropped, None, outcome)
                else:
                    yield _make_entry(outcome, values[place], self.has_token_logps)

    def _windows(self) -> Iterator[tuple[int, list[data.Outcome | str]]]:
        """Position of each window's first row, and each row's outcome or the problem with its token ids."""
        if self.data_format == "ids":
            pairs_of = _pairs_of_text if isinstance(self.rows, TextRows) else _pairs_of_ids
            for first in range(0, len(self.rows), WINDOW_ROWS):
                yield first, pairs_of(self.rows, first, self.truncation)  # type: ignore[arg-type]
            return
        assert self.tokenizer is not None
        tokenized = data.tokenized_windows(
            self.rows,
            self.data_format,
            self.tokenizer,
            template_date=self.template_date,
            window_rows=WINDOW_ROWS,
            spool=Path(),
            place=self.place,
        )
        for number, window in enumerate(tokenized):
            outcomes = list(data.make_pairs(window, self.truncation))
            self._check_single(outcomes)
            yield number * WINDOW_ROWS, outcomes  # type: ignore[misc]

    def _check_single(self, outcomes: Sequence[data.Outcome]) -> None:
        """Raise `DataError` for a row of several pairs."""
        several = [one.row for one, other in pairwise(outcomes) if one.row == other.row]
        if several:
            raise DataError(
                f"{self.place}: row {several[0]} has more than two answers, which cannot be imported, "
                f"because {' and '.join(SUMS)} are values of two answers.\nWrite one row a pair."
            )


def check_columns(columns: Sequence[str], place: str) -> None:
    """Raise `DataError` unless both answers have sums, or both have log-probs of their tokens."""
    missing = [name for name in SUMS if name not in columns]
    if not missing or set(TOKEN_LOGPS) <= set(columns):
        return
    alike = [name for name in columns if "logp" in name.lower()]
    example = next((name for name in alike if name not in (*SUMS, *TOKEN_LOGPS)), "COLUMN")
    raise DataError(
        f"{place} has no column {' or '.join(missing)}, but {', '.join(alike or columns)}.\n"
        "Name the columns that hold sums of log-probs with `map`, for example `map` "
        f"{missing[0]}={example}."
    )


def _values_of(rows: Dataset | TextRows, first: int, count: int) -> list[dict[str, Any]]:
    """The log-probs of so many rows from the first on."""
    wanted = [name for name in (*SUMS, *TOKEN_LOGPS) if name in rows.column_names]
    if not isinstance(rows, TextRows):
        columns = rows.select_columns(wanted)[first : first + count]
        return [dict(zip(wanted, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    read = _number_of if rows.is_untyped else (lambda value: value)
    return [
        {} if isinstance(row, RowProblem) else {name: read(row[name]) for name in wanted}
        for row in rows.at(first, count)
    ]


def _number_of(text: Any) -> Any:
    """The number in a cell of CSV; the cell itself if there is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text or None


def _pairs_of_text(rows: TextRows, first: int, truncation: data.Truncation) -> list[data.Outcome | str]:
    has_rows = type(data.first_row(rows, "the data")["row"]) is int
    found: list[data.Outcome | str] = []
    for place, row in enumerate(rows.at(first, WINDOW_ROWS), first):
        if isinstance(row, RowProblem):
            found.append(row.reason)
        elif has_rows and type(row["row"]) is not int:
            found.append(f"`row` is {describe(row['row'])}, expected a whole number")
        else:
            arrays = [_ids_of(row[name]) for name in ID_COLUMNS]
            own = row["rejected_prompt_ids"]
            arrays.append(arrays[0] if own is None else _ids_of(own))
            found.append(_pair_of_ids(place, row["row"] if has_rows else place, arrays, truncation))
    return found


def _ids_of(value: Any) -> TokenIds | None:
    """The token ids of a list; None if it is no list of whole numbers from 0 to 2^32 - 1."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return None
    try:
        return _in_range(np.array(value, np.int64))
    except OverflowError:
        return None


def _pairs_of_ids(rows: Dataset, first: int, truncation: data.Truncation) -> list[data.Outcome | str]:
    names = [name for name in (*ID_COLUMNS, "rejected_prompt_ids", "row") if name in rows.column_names]
    table: pa.Table = rows.select_columns(names).with_format("arrow")[first : first + WINDOW_ROWS]
    has_rows = "row" in names and pa.types.is_integer(table.schema.field("row").type)
    numbers = table.column("row").to_pylist() if has_rows else range(first, first + len(table))
    prompts, chosen, rejected = (_id_lists(table.column(name)) for name in ID_COLUMNS)
    rejected_prompts = prompts
    if "rejected_prompt_ids" in names:
        column = table.column("rejected_prompt_ids")
        own = zip(_id_lists(column), column.is_valid().to_pylist(), prompts, strict=True)
        rejected_prompts = [ids if is_own else prompt for ids, is_own, prompt in own]
    rows_of_ids = zip(numbers, prompts, chosen, rejected, rejected_prompts, strict=True)
    return [
        _pair_of_ids(place, number, arrays, truncation)
        for place, (number, *arrays) in enumerate(rows_of_ids, first)
    ]


def _pair_of_ids(
    place: int, row: int, arrays: Sequence[TokenIds | None], truncation: data.Truncation
) -> data.Outcome | str:
    """The outcome of the row at this position, or the problem with its token ids.

    `arrays` are the ids of prompt, chosen, rejected and the prompt of rejected.
    """
    for name, ids in zip((*ID_COLUMNS, "rejected_prompt_ids"), arrays, strict=True):
        if ids is None:
            return f"`{name}` is not a list of token ids"
    prompt, chosen, rejected, own = arrays
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
    """Token ids of each row; None if it is no list of whole numbers from 0 to 2^32 - 1."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
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
    chosen, rejected = (
        _token_score(side, values, sum_name, name)
        if has_token_logps
        else _sum_score(side, values[sum_name], sum_name)
        for side, sum_name, name in zip((pair.chosen, pair.rejected), SUMS, TOKEN_LOGPS, strict=True)
    )
    if isinstance(chosen, str):
        return Entry(outcome, None, chosen)
    if isinstance(rejected, str):
        return Entry(outcome, None, rejected)
    return Entry(outcome, (chosen, rejected), None)


def _sum_score(completion: Completion, value: Any, name: str) -> Score | str:
    return _problem_of(value, name, completion.num_tokens) or Score(NO_TOKENS, float(value))


def _token_score(completion: Completion, values: dict[str, Any], sum_name: str, name: str) -> Score | str:
    """The score of a list of log-probs. If the row has a sum, it must be the sum of the list."""
    tokens = values[name]
    if not isinstance(tokens, list):
        return f"`{name}` is {describe(tokens)}, expected a list of numbers"
    if len(tokens) != completion.num_tokens:
        return f"`{name}` does not have one value for each token of the answer"
    if problem := next(filter(None, (_problem_of(value, name) for value in tokens)), None):
        return problem
    score = Score(np.array(tokens, np.float32))
    if sum_name in values:
        if problem := _problem_of(values[sum_name], sum_name, completion.num_tokens):
            return problem
        absolute, relative = SUM_TOLERANCE
        if abs(values[sum_name] - score.logps) > absolute + relative * abs(score.logps):
            return f"`{sum_name}` is not the sum of `{name}`"
    return score


def _problem_of(value: Any, name: str, num_tokens: int = 1) -> str | None:
    """The reason why this value is no log-prob of so many tokens, in words that complete 'row 7: ...'."""
    if value is None:
        return f"`{name}` is missing"
    if isinstance(value, list):
        return (
            f"`{name}` is a list, expected a sum (values per token go into "
            f"`{name.replace('_logps', '_token_logps')}`)"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"`{name}` is {describe(value)}, expected a number"
    if not np.isfinite(value):
        return f"`{name}` is NaN or infinite"
    if value < LOWEST_LOGP * num_tokens:
        return f"`{name}` is below {LOWEST_LOGP:,.0f} nats a token, which no model gives"
    return f"`{name}` is above 0, but log-probs are at most 0" if value > ROUNDING else None
