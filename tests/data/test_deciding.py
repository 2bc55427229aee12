"""The row by which a format is decided: wrong rows and rows with nulls do not decide."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dpo_cache.data import deciding_row, detect_format, read_dataset, take_rows, tokenize_rows
from dpo_cache.data.read import Rows
from dpo_cache.errors import DataError
from tests.data.conftest import assistant, make_byte_tokenizer, user

TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}
MESSAGES = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
DIALOGUE = {"messages": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
COMPARED = {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "a"}
RANKED = {"prompt": "a", "responses": ["b", "c"], "scores": [1.0, 2.0]}

# wrong first row, good row, format
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no chosen text": ({**TEXT, "chosen": None}, TEXT, "text"),
    "no chosen messages": ({**MESSAGES, "chosen": None, "rejected": None}, MESSAGES, "conversation"),
    "no prompt": ({**MESSAGES, "prompt": None}, MESSAGES, "conversation"),
    "nothing": (dict.fromkeys(TEXT), MESSAGES, "conversation"),
    "no messages": ({**DIALOGUE, "messages": None}, DIALOGUE, "messages"),
    "no messages, but answers that read as dialogues": (
        {"messages": None, "chosen": "x b", "rejected": "x c"},
        {"messages": [user("a")], "chosen": "b", "rejected": "c"},
        "messages",
    ),
    "no verdict": ({**COMPARED, "winner": None}, COMPARED, "compared"),
    "no responses": ({**RANKED, "responses": None}, RANKED, "ranked"),
}


def rows_of(kind: str, given: list[dict[str, Any]], folder: Path) -> Rows:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    if kind == "parquet":
        Dataset.from_list(given).to_parquet(folder / "a.parquet")
    if kind in ("list", "dataset"):
        return take_rows(given if kind == "list" else Dataset.from_list(given))["train"]
    path = folder / ("a.parquet" if kind == "parquet" else "a.jsonl")
    return read_dataset(str(path), streaming=kind == "stream")["train"]


@pytest.mark.parametrize("kind", ["jsonl", "stream", "parquet", "list", "dataset"])
@pytest.mark.parametrize(("wrong", "good", "data_format"), CASES.values(), ids=CASES)
def test_a_first_row_with_nulls_is_a_wrong_row_and_decides_nothing(
    wrong: dict[str, Any], good: dict[str, Any], data_format: str, kind: str, tmp_path: Path
) -> None:
    rows = rows_of(kind, [wrong, good, good], tmp_path)
    found = deciding_row(rows, "p")
    assert {name: found[name] for name in good} == good
    columns = list(rows.column_names or found)
    assert detect_format(columns, found) == data_format
    assert deciding_row(rows, "p", data_format) == found


def test_the_wrong_first_row_is_named() -> None:
    rows = take_rows([{**MESSAGES, "chosen": None}, MESSAGES])["train"]
    data_format = detect_format(list(MESSAGES), deciding_row(rows, "p"))
    with pytest.raises(
        DataError, match="1 row cannot be used .*\n  `chosen` is missing.*: 1 row, number 0\n"
    ):
        tokenize_rows(rows, data_format, make_byte_tokenizer())


def test_where_no_row_can_be_used_the_first_decides() -> None:
    given = [{**TEXT, "chosen": None}, {**TEXT, "rejected": None}]
    assert deciding_row(take_rows(given)["train"], "p") == given[0]


def test_a_column_that_is_null_everywhere_is_no_reason_to_look_on() -> None:
    given = [{**TEXT, "messages": None, "responses": None}] * 2
    assert deciding_row(take_rows(given)["train"], "p") == given[0]
