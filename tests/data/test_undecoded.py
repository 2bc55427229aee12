"""Images and audio are not decoded."""

from typing import Any

import pytest
from datasets import Audio, Dataset, Features, Image, IterableDataset, List, Value

from dpo_cache.data import take_rows, tokenize_rows
from dpo_cache.data.undecoded import without_decoding
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
