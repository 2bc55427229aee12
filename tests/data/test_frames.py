"""Rows of pandas frames: whole numbers stay whole."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from dpo_cache.data.frames import rows_of_frame, whole_members, with_whole_numbers
from dpo_cache.data.read import read_dataset, take_rows
from dpo_cache.data.tokenize import tokenize_rows
from tests.data.conftest import assistant, make_byte_tokenizer, user


def call(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def calls(*arguments: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [[{"role": "assistant", "tool_calls": [{"arguments": one}]}] for one in arguments]


def test_numbers_that_arrow_and_pandas_made_floats_are_whole_again() -> None:
    chosen = calls({"n": 5}, {"city": "Oslo"}, {"n": 7, "x": 1.5}, {"x": 2.0})
    frame = Dataset.from_list([{"chosen": one} for one in chosen]).to_pandas()
    rows = [row["chosen"][0]["tool_calls"][0]["arguments"] for row in take_rows(frame)["train"]]
    assert repr(rows) == repr(
        [
            {"n": 5, "city": None, "x": None},
            {"n": None, "city": "Oslo", "x": None},
            {"n": 7, "city": None, "x": 1.5},
            {"n": None, "city": None, "x": 2.0},
        ]
    )


@pytest.mark.parametrize(
    ("cells", "whole"),
    [
        ([{"n": 5.0}, {"n": None}], {("c", "n")}),
        ([{"n": [{"m": 5.0}]}, {"n": [{"m": float("nan")}]}], {("c", "n", "m")}),
        ([{"n": 5.0}, {"n": 6.0}], set()),  # floats, for no null made them so
        ([{"n": 5.0}, {"n": 5}, {"n": None}], set()),
        ([{"n": 5.0}, {"n": 0.5}, {"n": None}], set()),
        ([{"n": float("inf")}, {"n": None}], set()),
        ([{"n": None}], set()),
        (["text", None, [1.0, None]], set()),
    ],
)
def test_which_members_are_whole(cells: list[Any], whole: set[tuple[str, ...]]) -> None:
    assert whole_members(("c", cell) for cell in cells) == whole


def test_only_those_members_change() -> None:
    value = {"n": 5.0, "m": [{"n": 6.0}], "text": "7.0", "none": None}
    found = with_whole_numbers(value, ("c",), {("c", "n")})
    assert repr(found) == repr({"n": 5, "m": [{"n": 6.0}], "text": "7.0", "none": None})


def test_ids_of_a_frame_are_those_of_its_rows(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    rows = [
        {"prompt": [user("a")], "chosen": [call({"n": 5})], "rejected": [call({"city": "Oslo"})]},
        {"prompt": [user("a")], "chosen": [call({"n": 6})], "rejected": [call({"city": "Rome"})]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean, found = (
        tokenize_rows(given["train"], "conversation", tokenizer)
        for given in (
            read_dataset(str(tmp_path / "a.jsonl")),
            take_rows(Dataset.from_list(rows).to_pandas()),
        )
    )
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[name] == clean[name]


def test_objects_keep_their_numbers() -> None:
    frame = pd.DataFrame([{"a": {"n": 5, "x": 5.0}}, {"a": {"n": 6}}])
    assert repr([dict(row) for row in rows_of_frame(frame)]) == repr(
        [{"a": {"n": 5, "x": 5.0}}, {"a": {"n": 6}}]
    )
