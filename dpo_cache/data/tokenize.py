"""Rows -> token ids, the same that TRL 1.16 makes with the same tokenizer and template.

A tokenized row is one pair, in the columns

    row                                   int64          number of the row in the data set; ranked rows make
                                          several pairs
    prompt_ids, chosen_ids, rejected_ids  list<uint32>   untruncated; a sequence is prompt_ids + chosen_ids
    moved_boundary                        bool           tokens merge across the end of the prompt; see
                                          `tokenize_rows`
    dropped                               string         why the row makes no pair; null where it does
    problem                               string         why the row cannot be used, which stops the run; null
                                          where it can
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, config, load_from_disk
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from dpo_cache.data.encode import encode_continuations, encode_dialogues
from dpo_cache.data.formats import Example, RowProblem, parse_row
from dpo_cache.data.read import STREAM_ERRORS, Rows, not_readable, not_utf8
from dpo_cache.data.survey import rows_by_reason
from dpo_cache.errors import DataError, ModelError, first_line
from dpo_cache.tokenizer import tokenizer_digest

BATCH_ROWS = 256  # rows tokenized at once: a thousand long dialogues would take 250 MB
IDS_VERSION = 3  # raised when the same text would get other ids or columns from us
IDS = ListOf(Value("uint32"))
FEATURES = Features(
    {
        "row": Value("int64"), "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS,
        "moved_boundary": Value("bool"), "dropped": Value("string"), "problem": Value("string"),
    }
)  # fmt: skip
RANKED_ALIKE = "answers all ranked alike"


def tokenized_windows(
    rows: Rows,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranked_pairs: str = "all",
    window_rows: int,
    spool: Path,
    place: str,
) -> Iterator[Dataset]:
    """The rows tokenized, at most `window_rows` at a time.

    Of a stream, each window is tokenized when it is asked for and kept in the folder `spool`, so that it can
    be read again; the rest is tokenized at once and kept in the cache of `datasets`. Raises as
    `tokenize_rows`.
    """
    if isinstance(rows, Dataset):
        tokenized = tokenize_rows(rows, data_format, tokenizer, ranked_pairs=ranked_pairs, place=place)
        for start in range(0, len(tokenized), window_rows):
            yield tokenized.select(range(start, min(start + window_rows, len(tokenized))))
        return
    for number, window in enumerate(_batches(rows, window_rows, place)):
        table = Dataset.from_list(window, features=rows.features)
        tokenized = tokenize_rows(
            table,
            data_format,
            tokenizer,
            ranked_pairs=ranked_pairs,
            first_row=number * window_rows,
            place=place,
        )
        tokenized.save_to_disk(spool / str(number))
        yield load_from_disk(str(spool / str(number)))


def tokenize_rows(
    dataset: Dataset,
    data_format: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ranked_pairs: str = "all",
    first_row: int = 0,
    place: str = "the data",
) -> Dataset:
    """Token ids of every pair, in the columns that the module's docstring lists.

    Text is tokenized as prompt and prompt + answer, the answer ending in the EOS token; conversations go
    through the chat template, the prompt alone with its generation prompt. The answers start where the
    ids of prompt and prompt + answer part, so no answer token is lost where tokens merge across the
    boundary; `moved_boundary` marks those rows. Kept in the cache of `datasets`, keyed by data and tokenizer.

    Raises `DataError` for rows that cannot be used, all of them at once, and `ModelError` for conversations
    without a chat template, or text without an EOS token.
    """
    recipe = [
        dataset._fingerprint,
        data_format,
        ranked_pairs,
        str(first_row),
        tokenizer_digest(tokenizer),
        str(IDS_VERSION),
    ]

    def tokenize_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [parse_row(row, data_format, ranked_pairs) for row in rows]
        return _tokenize_examples(examples, [first_row + number for number in numbers], tokenizer)

    try:
        tokenized = dataset.map(
            tokenize_batch, batched=True, with_indices=True, remove_columns=dataset.column_names,
            features=FEATURES, batch_size=BATCH_ROWS,
            new_fingerprint=hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:32],
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise not_utf8(place, error) from error
    except OSError as error:
        raise DataError(
            f"{place}: the tokenized rows cannot be kept in {config.HF_DATASETS_CACHE} "
            f"({first_line(error)}).\n"
            "Free some space there, or set HF_HOME to another folder."
        ) from error
    _check_problems(tokenized, data_format, place)
    return tokenized


def _batches(rows: IterableDataset, num_rows: int, place: str) -> Iterator[list[dict[str, Any]]]:
    stream = iter(rows)
    while True:
        try:
            batch = list(islice(stream, num_rows))
        except UnicodeDecodeError as error:
            raise not_utf8(place, error) from error
        except STREAM_ERRORS as error:
            raise not_readable(place, error) from error
        if not batch:
            return
        yield batch


def _check_problems(tokenized: Dataset, data_format: str, place: str) -> None:
    """Raise one `DataError` for all unusable rows: each reason with its count and first rows."""
    problems = tokenized.data.column("problem")
    if problems.null_count == len(problems):
        return
    found = [
        (row, reason)
        for row, reason in zip(tokenized.data.column("row").to_pylist(), problems.to_pylist(), strict=True)
        if reason
    ]
    raise DataError(
        f"{place}: {len(found)} row{'s' if len(found) > 1 else ''} cannot be used (rows are counted from "
        f"0, format {data_format}):\n{rows_by_reason(found)}\nCorrect or remove them and run again."
    )


def _tokenize_examples(
    examples: Sequence[Example | RowProblem], numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    _check_tokenizer(tokenizer, [example for example in examples if isinstance(example, Example)])
    texts = _texts_of(examples, tokenizer)
    ids = _encode(examples, texts, tokenizer)
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}

    def add(*values: Any) -> None:
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)

    for number, example, rendered, sequences in zip(numbers, examples, texts, ids, strict=True):
        if isinstance(rendered, RowProblem):
            add(number, [], [], [], False, None, rendered.reason)
            continue
        assert isinstance(example, Example)
        if not example.pairs:
            add(number, [], [], [], False, RANKED_ALIKE, None)
            continue
        prompt, *answers = sequences
        cut = min(_shared_prefix(prompt, answer) for answer in answers)
        for chosen, rejected in example.pairs:
            add(
                number,
                prompt[:cut],
                answers[chosen][cut:],
                answers[rejected][cut:],
                cut < len(prompt),
                None,
                None,
            )
    return columns


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
    if not tokenizer.chat_template and not all(example.is_text for example in examples):
        raise ModelError(
            f"the data holds conversations, but the tokenizer {tokenizer.name_or_path} has no chat "
            "template.\n"
            "Give one with `chat_template` FILE (Jinja), or a tokenizer that has one with `tokenizer`."
        )
    if tokenizer.eos_token is None and any(example.is_text for example in examples):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no EOS token to end an answer with.\n"
            "Give another with `tokenizer`."
        )


def _texts_of(
    examples: Sequence[Example | RowProblem], tokenizer: PreTrainedTokenizerBase
) -> list[list[str] | RowProblem]:
    """Per example: the prompt, then prompt + answer for each answer, as the tokenizer reads them."""
    chats = [example for example in examples if isinstance(example, Example) and not example.is_text]
    rendered = iter(_render(chats, tokenizer))
    return [
        example
        if isinstance(example, RowProblem)
        else _ended(example, tokenizer.eos_token)
        if example.is_text
        else next(rendered)
        for example in examples
    ]


def _ended(example: Example, eos: str) -> list[str]:
    """Texts of a text example; each answer ends in the EOS token."""
    answers = [answer if answer.endswith(eos) else answer + eos for answer in example.answers]  # type: ignore[union-attr, operator]
    return [example.prompt, *(example.prompt + answer for answer in answers)]  # type: ignore[list-item, operator]


def _render(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[str] | RowProblem]:
    """Texts of conversations, through the chat template; one by one where a row hands something to it, or it
    fails.
    """
    if not any(example.template_options or _called(example) for example in examples):
        try:
            return [*_render_alike(examples, tokenizer)] if examples else []
        except Exception:  # a template is a program: it raises what it likes; below it is told of which row
            pass
    texts: list[list[str] | RowProblem] = []
    for example in examples:
        try:
            rendered = _render_alike([example], tokenizer)[0]
        except Exception as error:
            texts.append(RowProblem(f"the chat template refuses it ({first_line(error)})"))
            continue
        is_lost = any(name not in "".join(rendered) for name in _called(example))
        texts.append(
            RowProblem(
                "the chat template leaves its tool calls out; give one that writes them with `chat_template`"
            )
            if is_lost
            else rendered
        )
    return texts


def _called(example: Example) -> set[str]:
    """Names of the tools that the example's messages call."""
    messages = [message for content in (example.prompt, *example.answers) for message in content]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]  # type: ignore[union-attr]
    return {str((call.get("function") or call).get("name") or "") for call in calls if isinstance(call, dict)}


def _render_alike(examples: Sequence[Example], tokenizer: Any) -> list[list[str]]:
    """Texts of examples that share their template options."""
    options = examples[0].template_options
    prompts: Any = tokenizer.apply_chat_template(
        [example.prompt for example in examples],
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    dialogues = [example.prompt + answer for example in examples for answer in example.answers]  # type: ignore[operator]
    rendered = iter(tokenizer.apply_chat_template(dialogues, tokenize=False, **options))
    return [
        [prompt, *islice(rendered, len(example.answers))]
        for prompt, example in zip(prompts, examples, strict=True)
    ]  # type: ignore[list-item]


def _encode(
    examples: Sequence[Example | RowProblem],
    texts: Sequence[list[str] | RowProblem],
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[list[int]]]:
    """Ids of each example's texts; none for a problem."""
    ids: list[list[list[int]]] = [[] for _ in texts]
    usable = [
        (place, example)
        for place, example in enumerate(examples)
        if isinstance(example, Example) and isinstance(texts[place], list)
    ]
    plain, chats = (
        [place for place, example in usable if example.is_text == is_text] for is_text in (True, False)
    )
    plain_ids = encode_continuations(tokenizer, [texts[place] for place in plain])  # type: ignore[misc]
    dialogues = encode_dialogues(tokenizer, [texts[place] for place in chats])  # type: ignore[misc]  # rendered with their special tokens
    for place, sequences in zip([*plain, *chats], [*plain_ids, *dialogues], strict=True):
        ids[place] = sequences
    return ids


def _shared_prefix(ids: list[int], other: list[int]) -> int:
    if other[: len(ids)] == ids:
        return len(ids)
    return next(
        (place for place, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two),
        min(len(ids), len(other)),
    )
