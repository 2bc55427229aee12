"""Images and audio are not decoded."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Audio, Dataset, Features, Image, IterableDataset, List, Value

from dpo_cache.data import take_rows, tokenize_rows, tokenized_windows
from dpo_cache.data.undecoded import media_columns, without_decoding
from tests.data.conftest import make_byte_tokenizer
from tests.data.test_lost import AUDIO, IMAGES

STORED = {"bytes": b"no image", "path": None}
ROW = {
    "prompt": "What?", "chosen": " A cat", "rejected": " A dog", "image": STORED, "images": [STORED, STORED],
    "audio": STORED, "more": {"image": STORED},
}  # fmt: skip
TEXT = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
MEDIA = Features(
    {**TEXT, "image": Image(), "images": List(Image()), "audio": Audio(), "more": {"image": Image()}}
)


def media_rows() -> Dataset:
    return Dataset.from_list([ROW] * 3).cast(MEDIA)


def as_stream(rows: Dataset) -> IterableDataset:
    return rows.to_iterable_dataset()


@pytest.mark.parametrize("kind", [lambda rows: rows, as_stream, lambda rows: rows.select([2, 1])])
def test_media_are_read_as_they_are_stored(kind: Any) -> None:
    rows = without_decoding(kind(media_rows()))
    assert next(iter(rows)) == ROW


def test_rows_without_media_are_the_same_object() -> None:
    rows = Dataset.from_list([{"prompt": "a"}])
    assert without_decoding(rows) is rows
    assert without_decoding([1]) == [1]


def test_rows_with_media_are_tokenized_as_text_with_a_note() -> None:
    rows = take_rows(media_rows(), limit=2)["train"]
    found = tokenize_rows(rows, "text", make_byte_tokenizer()).to_list()
    assert [row["notes"] for row in found] == [[IMAGES, AUDIO]] * 2
    assert make_byte_tokenizer().decode(found[0]["prompt_ids"]) == "What?"


@pytest.mark.parametrize("kind", [lambda rows: rows, as_stream])
def test_media_under_any_name_are_known_by_their_type(kind: Any, tmp_path: Path) -> None:
    types = {**TEXT, "shot": Image(), "pages": List(Image()), "voice": Audio()}
    stored = {"shot": STORED, "pages": [], "voice": {"bytes": None, "path": None}}
    rows = [{**{name: ROW[name] for name in TEXT}, **stored}, ROW | stored | {"voice": STORED}]
    found = take_rows(
        kind(Dataset.from_list([{n: row[n] for n in types} for row in rows]).cast(Features(types)))
    )
    assert media_columns(found["train"]) == {"shot": "image", "pages": "image", "voice": "audio"}
    (table,) = tokenized_windows(
        found["train"], "text", make_byte_tokenizer(), window_rows=5, spool=tmp_path, place="the data"
    )
    assert [row["notes"] for row in table.to_list()] == [[IMAGES], [IMAGES, AUDIO]]
