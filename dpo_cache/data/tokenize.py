"""Rows -> token ids, the same that TRL 1.16 makes with the same tokenizer and template.

Each tokenized row is one pair:

    row                                   int64          row number in the data set; a ranked row makes
                                                         several pairs
    prompt_ids, chosen_ids, rejected_ids  list<uint32>   untruncated; a sequence is prompt_ids + chosen_ids
    moved_boundary                        bool           tokens merge across the end of the prompt; see
                                                         `tokenize_rows`
    dropped                               string         why the row makes no pair; null if it makes one
    problem                               string         why the row cannot be used, which stops the run or
                                                         drops the row; null if it can
    notes                                 list<string>   what happened to the row and is worth a remark; the
                                                         survey counts the rows of each note
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, config, load_from_disk
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from dpo_cache.data.early_answers import early_notes
from dpo_cache.data.equal_answers import explain_equal_ids
from dpo_cache.data.examples import Example, RowProblem, shared_prefix
from dpo_cache.data.lost import row_notes
from dpo_cache.data.problems import problems_by_reason, unusable_rows
from dpo_cache.data.read import Rows, not_utf8, reading
from dpo_cache.data.render import encode_examples
from dpo_cache.data.serialized import with_parsed_columns
from dpo_cache.data.template_date import with_template_date
from dpo_cache.data.text_rows import TextRows, TextStream, rows_in_memory
from dpo_cache.data.undecoded import media_columns, table_of_rows
from dpo_cache.data.unions import nested_columns, parse_nested_row
from dpo_cache.errors import DataError, first_line
from dpo_cache.tokenizer import tokenizer_digest

BATCH_ROWS = 256  # rows tokenized at once: a thousand long dialogues would take 250 MB
IDS_VERSION = 4  # raised when the same text would get other ids or columns from us
IDS = ListOf(Value("uint32"))
FEATURES = Features(
    {
        "row": Value("int64"), "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS,
        "moved_boundary": Value("bool"), "dropped": Value("string"), "problem": Value("string"),
        "notes": ListOf(Value("string")),
    }
)  # fmt: skip
RANKED_ALIKE = "answers all ranked alike"


def tokenized_windows(
    rows: Rows,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranked_pairs: str = "all",
    template_date: date | None = None,
    window_rows: int,
    spool: Path,
    place: str,
    on_error: str = "stop",
    log: Callable[[str], None] | None = None,
) -> Iterator[Dataset]:
    """Yield the rows tokenized, at most `window_rows` at a time.

    A `Dataset` is tokenized as a whole first and kept in the cache of `datasets`. A stream is tokenized
    window by window; each is saved in the folder `spool`, so that it can be read again. Raises as
    `tokenize_rows`.
    """
    settings: dict[str, Any] = {
        "ranked_pairs": ranked_pairs,
        "template_date": template_date,
        "place": place,
        "on_error": on_error,
        "log": log,
    }
    if isinstance(rows, (Dataset, TextRows)):
        tokenized = tokenize_rows(rows, data_format, tokenizer, **settings)
        for start in range(0, len(tokenized), window_rows):
            yield tokenized.select(range(start, min(start + window_rows, len(tokenized))))
        return
    first = 0
    for number, window in enumerate(_tables(rows, window_rows, place)):
        tokenized = tokenize_rows(window, data_format, tokenizer, first_row=first, **settings)
        first += len(window)
        tokenized.save_to_disk(spool / str(number))
        yield load_from_disk(str(spool / str(number)))


def tokenize_rows(
    rows: Dataset | TextRows,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranked_pairs: str = "all",
    template_date: date | None = None,
    first_row: int = 0,
    place: str = "the data",
    on_error: str = "stop",
    log: Callable[[str], None] | None = None,
) -> Dataset:
    """Token ids of every pair, in the columns that the module's docstring lists.

    Text is tokenized as prompt and prompt + answer, the answer ending in the EOS token; conversations are
    rendered by the chat template, the prompt with its generation prompt. The answers start where the ids of
    prompt and prompt + answer begin to differ, so no answer token is lost where tokens merge across the
    boundary; `moved_boundary` marks those rows. A template that depends on the day writes `template_date`,
    by default today. Kept in the cache of `datasets`, keyed by data, tokenizer and that day.

    Rows that cannot be used have a `problem`. Raises one `DataError` for all of them; with `on_error` drop, a
    remark for `log` names them instead. Raises `ModelError` for conversations without a chat template, or
    text without an EOS token.
    """
    tokenizer = with_template_date(tokenizer, template_date)
    table = rows.table if isinstance(rows, TextRows) else rows
    fingerprint = rows.fingerprint if isinstance(rows, TextRows) else rows._fingerprint
    made_from = [fingerprint, data_format, ranked_pairs, str(first_row)]
    made_from += [tokenizer_digest(tokenizer), str(IDS_VERSION)]

    nested, media = nested_columns(rows), media_columns(rows)

    def tokenize_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        found = (
            rows.decode(batch)
            if isinstance(rows, TextRows)
            else [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        )
        examples = [
            row if isinstance(row, RowProblem) else parse_nested_row(row, nested, data_format, ranked_pairs)
            for row in found
        ]
        source = [row if isinstance(row, RowProblem) else with_parsed_columns(row) for row in found]
        places = [first_row + number for number in numbers]
        return _tokenize_examples(examples, source, places, tokenizer, media)

    try:
        tokenized = table.map(
            tokenize_batch, batched=True, with_indices=True, remove_columns=table.column_names,
            features=FEATURES, batch_size=BATCH_ROWS,
            new_fingerprint=hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:32],
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error
    except OSError as error:
        raise DataError(
            f"{place}: the tokenized rows cannot be kept in {config.HF_DATASETS_CACHE} "
            f"({first_line(error)}).\n"
            "Free some space there, or set HF_HOME to another folder."
        ) from error
    problems = [(row - first_row, reason) for row, reason in _problems(tokenized)]
    if problems and on_error == "stop":
        raise DataError(
            unusable_rows(problems, rows, place=place, data_format=data_format, first_row=first_row)
        )
    if problems and log is not None:
        log(f"{place}: left out are {'; '.join(problems_by_reason(problems, rows, first_row))}.")
    return tokenized


def _tables(rows: IterableDataset | TextStream, num_rows: int, place: str) -> Iterator[Dataset | TextRows]:
    """Yield the rows of a stream as tables of so many."""
    if isinstance(rows, TextStream):
        yield from rows.windows(num_rows)
        return
    stream = iter(rows)
    while True:
        with reading(place):
            batch = list(islice(stream, num_rows))
        if not batch:
            return
        yield rows_in_memory(batch) if rows.features is None else table_of_rows(batch, rows.features)


def _problems(tokenized: Dataset) -> list[tuple[int, str]]:
    """The number of each row that cannot be used, and the reason."""
    problems = tokenized.data.column("problem")
    if problems.null_count == len(problems):
        return []
    rows = tokenized.data.column("row").to_pylist()
    return [(row, reason) for row, reason in zip(rows, problems.to_pylist(), strict=True) if reason]


def _tokenize_examples(
    examples: Sequence[Example | RowProblem],
    source: Sequence[Any],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    media: Mapping[str, str],
) -> dict[str, list[Any]]:
    """The columns of `FEATURES` for these rows, which were read as `source`; `media` are those of columns."""
    rows: list[tuple[Any, ...]] = []
    encoded = encode_examples(examples, tokenizer)
    for number, example, read, found in zip(numbers, examples, source, encoded, strict=True):
        if isinstance(found, RowProblem):
            rows.append((number, [], [], [], False, None, found.reason, []))
            continue
        assert isinstance(example, Example)
        if not example.pairs:
            rows.append((number, [], [], [], False, RANKED_ALIKE, None, []))
            continue
        prompt, *answers = found.ids
        cut = min(shared_prefix(prompt, answer) for answer in answers)
        ends = [answer[cut:] for answer in answers]
        notes = [*example.notes, *row_notes(read, [example.prompt, *example.answers], media), *found.notes]
        notes += early_notes(example, prompt[cut:], tokenizer)
        for pair in example.pairs:
            chosen, rejected = (ends[place] for place in pair)
            lost = explain_equal_ids(example, pair, read) if chosen == rejected else None
            rows.append((number, prompt[:cut], chosen, rejected, cut < len(prompt), lost, None, notes))
    return {name: list(column) for name, column in zip(FEATURES, zip(*rows, strict=True), strict=True)}
