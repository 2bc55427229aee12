"""The text of a pair set, read again from its source.

Decoding token ids does not give back the text that they came from. So the source is read and tokenized once
more (`datasets` keeps the tokens of earlier runs), and its text is used only if it makes the same pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from dpo_cache import data
from dpo_cache.data.examples import RowProblem
from dpo_cache.data.formats import FORMATS
from dpo_cache.data.text_rows import TextRows
from dpo_cache.errors import DataError, ModelError, OptionError, first_line, printable
from dpo_cache.exchange.source_places import choose_place, set_template_of
from dpo_cache.store import completion_key
from dpo_cache.store.format.documents import Document
from dpo_cache.store.format.pair_tables import PairsDigest
from dpo_cache.types import Pair

WINDOW_ROWS = 4096

TextRow = dict[str, Any]


@dataclass(frozen=True)
class SourceText:
    """The source of a pair set; iterating gives `prompt`, `chosen`, `rejected` of each pair, in order."""

    rows: Dataset | TextRows
    tokenized: list[Dataset]
    data_format: str
    ranked_pairs: str
    truncation: data.Truncation

    def __iter__(self) -> Iterator[TextRow]:
        outcomes = (
            outcome for window in self.tokenized for outcome in data.make_pairs(window, self.truncation)
        )
        nested = data.nested_columns(self.rows)
        for row, (_, group) in zip(
            self.rows, groupby(outcomes, key=lambda outcome: outcome.row), strict=True
        ):
            if isinstance(row, RowProblem):
                continue
            row, _ = data.without_union_nulls(row, nested)
            example = data.parse_row(row, self.data_format, self.ranked_pairs)
            for place, outcome in enumerate(group):
                if isinstance(outcome.pair, Pair) and isinstance(example, data.Example):
                    yield _text_row(example, example.pairs[place])

    def pairs_digest(self) -> str:
        """The digest of the pairs that the source makes now."""
        digest = PairsDigest()
        for window in self.tokenized:
            for pair in data.kept_pairs(window, self.truncation):
                digest.add(pair.row, completion_key(pair.chosen), completion_key(pair.rejected))
        return digest.hexdigest()

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow type of each column, common to all rows. Raises `DataError` if there is none."""
        rows, merged = iter(self), pa.schema([])
        try:
            while batch := list(islice(rows, WINDOW_ROWS)):
                merged = pa.unify_schemas(
                    [merged, pa.Table.from_pylist(batch).schema], promote_options="permissive"
                )
        except pa.ArrowException as error:
            raise DataError(f"its rows have no type in common ({first_line(error)})") from error
        return pa.schema([field for field in merged if field.type != pa.null()])


def find_source_text(manifest: Document, *, dataset: str | None, tokenizer: str | None) -> SourceText | str:
    """The text of the pair set with this manifest, or the reason why there is none, in words that complete
    'no text: ...'.
    """
    source = manifest["source"]
    if source["format"] == "ids":
        return "the pair set was imported as token ids"
    if dataset is None and source.get("rows_of") == "memory":
        return "the rows of the pair set were given in memory"
    try:
        place = choose_place(manifest, "dataset", dataset)
        found = _read_source(manifest, place, choose_place(manifest, "tokenizer", tokenizer))
        if found.pairs_digest() != manifest["pairs_digest"]:
            return f"{printable(place)} no longer makes the pairs of this set"
        found.schema  # noqa: B018  (raises if there is none)
    except (DataError, ModelError, OptionError) as error:
        return first_line(error).rstrip(".:")
    return found


def _read_source(manifest: Document, dataset: str, tokenizer_location: str) -> SourceText:
    """The source opened and tokenized again. Raises `ModelError` if the tokenizer is another one."""
    source, made_with = manifest["source"], manifest["tokenization"]
    tokenizer = data.load_tokenizer(tokenizer_location)
    set_template_of(manifest, tokenizer, tokenizer_location)
    digest = made_with.get("tokenizer_sha256")  # without it, the digest of the pairs decides
    if digest is not None and data.tokenizer_digest(tokenizer) != digest:
        raise ModelError(
            f"the tokenizer in {printable(tokenizer_location)} is not the one that made the token ids"
        )
    rename = dict(entry.split("=", 1) for entry in source.get("map", ()))
    rows = data.read_dataset(dataset, (manifest["split"],), source.get("rows_read") or None, rename=rename)[
        manifest["split"]
    ]
    assert isinstance(rows, (Dataset, TextRows))
    place, ranked_pairs = f"{dataset}: split {manifest['split']}", source.get("ranked_pairs", "all")
    if source["format"] not in FORMATS:
        raise DataError(f"the manifest names a format that is not known: {printable(source['format'])[:40]}")
    data.check_format(source["format"], rows.column_names, place)
    windows = data.tokenized_windows(
        rows,
        source["format"],
        tokenizer,
        ranked_pairs=ranked_pairs,
        template_date=data.template_date_of(manifest),
        window_rows=WINDOW_ROWS,
        spool=Path(),
        place=place,
        on_error=source.get("on_error", "stop"),
    )
    truncation = data.Truncation(
        made_with["max_length"], made_with["truncation"], made_with.get("max_prompt_length")
    )
    return SourceText(rows, list(windows), source["format"], ranked_pairs, truncation)


def _text_row(example: data.Example, pair: tuple[int, int]) -> TextRow:
    """The columns that TRL reads: text as text, dialogues as messages, tools as JSON."""
    columns = {
        "prompt": example.prompt,
        "chosen": example.answers[pair[0]],
        "rejected": example.answers[pair[1]],
    }
    if example.is_text:
        return columns
    options = dict(example.template_options)
    tools = options.pop("tools", None)
    tools = json.dumps(tools, ensure_ascii=False) if tools else None
    return {**columns, "tools": tools, "chat_template_kwargs": options or None}
