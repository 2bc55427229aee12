"""Rows -> token ids, the same that TRL 1.16 makes with the same tokenizer and template.

Each tokenized row is one pair:

    row                                   int64          row number in the data set; a ranked row makes
                                                         several pairs
    prompt_ids, chosen_ids, rejected_ids  list<uint32>   untruncated; a sequence is prompt_ids + chosen_ids
    moved_boundary                        bool           tokens merge across the end of the prompt; see
                                                         `tokenize_rows`
    dropped                               string         why the row makes no pair; null if it makes one
    problem                               string         why the row cannot be used, which stops the run;
                                                         null if it can
    notes                                 list<string>   what happened to the row and is worth a remark; the
                                                         survey counts the rows of each note
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value, config, load_from_disk
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from dpo_cache.data.encode import encode_continuations, encode_dialogues
from dpo_cache.data.examples import Example, RowProblem, parse_row, shared_prefix
from dpo_cache.data.read import Rows, not_utf8, reading
from dpo_cache.data.survey import rows_by_reason
from dpo_cache.errors import DataError, ModelError, first_line
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
    window_rows: int,
    spool: Path,
    place: str,
) -> Iterator[Dataset]:
    """Yield the rows tokenized, at most `window_rows` at a time.

    A `Dataset` is tokenized as a whole first and kept in the cache of `datasets`. A stream is tokenized
    window by window; each is saved in the folder `spool`, so that it can be read again. Raises as
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

    Text is tokenized as prompt and prompt + answer, the answer ending in the EOS token; conversations are
    rendered by the chat template, the prompt with its generation prompt. The answers start where the ids of
    prompt and prompt + answer begin to differ, so no answer token is lost where tokens merge across the
    boundary; `moved_boundary` marks those rows. Kept in the cache of `datasets`, keyed by data and tokenizer.

    Raises one `DataError` for all rows that cannot be used, and `ModelError` for conversations without a chat
    template, or text without an EOS token.
    """
    made_from = [dataset._fingerprint, data_format, ranked_pairs, str(first_row)]
    made_from += [tokenizer_digest(tokenizer), str(IDS_VERSION)]

    def tokenize_batch(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [parse_row(row, data_format, ranked_pairs) for row in rows]
        return _tokenize_examples(examples, [first_row + number for number in numbers], tokenizer)

    try:
        tokenized = dataset.map(
            tokenize_batch, batched=True, with_indices=True, remove_columns=dataset.column_names,
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
    _check_problems(tokenized, data_format, place)
    return tokenized


def _batches(rows: IterableDataset, num_rows: int, place: str) -> Iterator[list[dict[str, Any]]]:
    stream = iter(rows)
    while True:
        with reading(place):
            batch = list(islice(stream, num_rows))
        if not batch:
            return
        yield batch


def _check_problems(tokenized: Dataset, data_format: str, place: str) -> None:
    """Raise one `DataError` for all unusable rows: each reason with its count and first rows."""
    problems = tokenized.data.column("problem")
    if problems.null_count == len(problems):
        return
    rows = tokenized.data.column("row").to_pylist()
    found = [(row, reason) for row, reason in zip(rows, problems.to_pylist(), strict=True) if reason]
    raise DataError(
        f"{place}: {len(found)} row{'s' if len(found) > 1 else ''} cannot be used (rows are counted from "
        f"0, format {data_format}):\n{rows_by_reason(found)}\nCorrect or remove them and run again."
    )


def _tokenize_examples(
    examples: Sequence[Example | RowProblem], numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    """The columns of `FEATURES` for these rows."""
    rows: list[tuple[Any, ...]] = []
    for number, example, ids in zip(numbers, examples, _encode(examples, tokenizer), strict=True):
        if isinstance(ids, RowProblem):
            rows.append((number, [], [], [], False, None, ids.reason, []))
            continue
        assert isinstance(example, Example)
        if not example.pairs:
            rows.append((number, [], [], [], False, RANKED_ALIKE, None, []))
            continue
        prompt, *answers = ids
        cut = min(shared_prefix(prompt, answer) for answer in answers)
        ends = [answer[cut:] for answer in answers]
        rows += [
            (
                number,
                prompt[:cut],
                ends[chosen],
                ends[rejected],
                cut < len(prompt),
                None,
                None,
                list(example.notes),
            )
            for chosen, rejected in example.pairs
        ]
    return {name: list(column) for name, column in zip(FEATURES, zip(*rows, strict=True), strict=True)}


def _encode(
    examples: Sequence[Example | RowProblem], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]] | RowProblem]:
    """Ids of each example's texts: the prompt, then prompt + answer for each answer."""
    usable = [example for example in examples if isinstance(example, Example)]
    plain = [example for example in usable if example.is_text]
    chats = [example for example in usable if not example.is_text]
    if chats and not tokenizer.chat_template:
        raise ModelError(
            f"the data holds conversations, but the tokenizer {tokenizer.name_or_path} has no chat "
            "template.\n"
            "Give one with `chat_template` FILE (Jinja), or a tokenizer that has one with `tokenizer`."
        )
    if plain and tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no EOS token to end an answer with.\n"
            "Give another with `tokenizer`."
        )
    texts = [_plain_texts(example, tokenizer.eos_token) for example in plain]
    plain_ids, chat_ids = iter(encode_continuations(tokenizer, texts)), iter(_encode_chats(chats, tokenizer))
    return [
        example if isinstance(example, RowProblem) else next(plain_ids if example.is_text else chat_ids)
        for example in examples
    ]


def _plain_texts(example: Example, eos: str) -> list[str]:
    """Texts of an example that is text; each answer ends in the EOS token."""
    answers = [answer if answer.endswith(eos) else answer + eos for answer in example.answers]  # type: ignore[union-attr, operator]
    return [example.prompt, *(example.prompt + answer for answer in answers)]  # type: ignore[list-item, operator]


def _encode_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]] | RowProblem]:
    """Ids of the texts of conversations; the chat template writes the special tokens."""
    rendered = _render(examples, tokenizer)
    ids = iter(encode_dialogues(tokenizer, [texts for texts in rendered if isinstance(texts, list)]))
    return [texts if isinstance(texts, RowProblem) else next(ids) for texts in rendered]


def _render(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Sequence[list[str] | RowProblem]:
    """Texts of conversations: rendered in one call, unless an example has template options or calls tools, or
    the call fails.
    """
    if examples and not any(example.template_options or _called_tools(example) for example in examples):
        with suppress(Exception):  # a template is a program and may raise anything; see `_render_one`
            return _render_alike(examples, tokenizer)
    return [_render_one(example, tokenizer) for example in examples]


def _render_one(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str] | RowProblem:
    try:
        (rendered,) = _render_alike([example], tokenizer)
    except Exception as error:
        return RowProblem(f"the chat template refuses it ({first_line(error)})")
    if any(name not in "".join(rendered) for name in _called_tools(example)):
        return RowProblem(
            "the chat template leaves its tool calls out; give one that writes them with `chat_template`"
        )
    return rendered


def _render_alike(examples: Sequence[Example], tokenizer: Any) -> list[list[str]]:
    """Texts of examples that have the same template options."""
    options = examples[0].template_options
    prompts = tokenizer.apply_chat_template(
        [example.prompt for example in examples], tokenize=False, add_generation_prompt=True, **options
    )
    dialogues = [example.prompt + answer for example in examples for answer in example.answers]  # type: ignore[operator]
    rendered = iter(tokenizer.apply_chat_template(dialogues, tokenize=False, **options))
    return [
        [prompt, *islice(rendered, len(example.answers))]
        for prompt, example in zip(prompts, examples, strict=True)
    ]


def _called_tools(example: Example) -> set[str]:
    """Names of the tools that the example's messages call."""
    messages = [message for content in (example.prompt, *example.answers) for message in content]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]  # type: ignore[union-attr]
    return {str((call.get("function") or call).get("name") or "") for call in calls if isinstance(call, dict)}
