"""Rows stay what their source has: to the letter, whole and streamed, compressed or not, and in memory."""

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from dpo_cache.data import detect_format, first_row, read_dataset, take_rows, tokenize_rows
from dpo_cache.data.text_rows import TextRows, TextStream
from dpo_cache.data.tokenize import tokenized_windows
from dpo_cache.errors import DataError
from tests.data.conftest import make_byte_tokenizer

ODD_TEXTS = [
    "2024-01-31", "2024-01-31T10:00:00Z", "10:30", "007", "1.0", "1e5", "True", "null", "NA", "NaN", "None",
    "12345678901234567890123", " x ", "\ttab", 'a "quote"', "a,b;c|d", "line\nline", "\u2028", "\x00", "é🙂",
    "[1, 2]", "{}", "\\n", "\\ud800",
]  # fmt: skip
ODD = [{"prompt": text, "chosen": text, "rejected": text + "!"} for text in ODD_TEXTS]
TEXT = {"prompt": "a", "chosen": "b", "rejected": "c"}


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "escaped.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "crlf.jsonl": lambda rows: jsonl(rows).replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda rows: b"\n \n" + jsonl(rows).replace(b"\n", b"\n\n\n"),
    "end.jsonl": lambda rows: jsonl(rows).rstrip(),
    "a.json": lambda rows: json.dumps(rows).encode(),
    "spread.json": lambda rows: json.dumps(rows, indent=2).encode(),
    "one-after-the-other.json": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
    "data.json": lambda rows: json.dumps({"data": rows}).encode(),
    "columns.json": lambda rows: json.dumps({name: [row[name] for row in rows] for name in rows[0]}).encode(),
    "columns-spread.json": lambda rows: json.dumps(
        {name: [row[name] for row in rows] for name in rows[0]}, indent=1
    ).encode(),
    "pandas.json": lambda rows: pd.DataFrame(rows).to_json().encode(),
    "a.csv": delimited,
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + delimited(rows),
    "semicolon.csv": lambda rows: delimited(rows, ";"),
    "a.tsv": lambda rows: delimited(rows, "\t"),
    "a.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "a.jsonl.bz2": lambda rows: bz2.compress(jsonl(rows)),
    "a.jsonl.xz": lambda rows: lzma.compress(jsonl(rows)),
    "a.jsonl.zst": lambda rows: zstd(jsonl(rows)),
    "a.json.gz": lambda rows: gzip.compress(json.dumps(rows, indent=1).encode()),
    "a.csv.gz": lambda rows: gzip.compress(delimited(rows)),
    "two-parts.jsonl.gz": lambda rows: gzip.compress(jsonl(rows[:3])) + gzip.compress(jsonl(rows[3:])),
    "plain.jsonl.gz": jsonl,
}


def read(location: object, *, streaming: bool = False, **options: Any) -> Any:
    return read_dataset(str(location), streaming=streaming, **options)["train"]


def problems_of(location: object, *, streaming: bool, **options: Any) -> str:
    """The error of tokenizing, or of reading where that fails."""
    with pytest.raises(DataError) as raised:
        rows = read(location, streaming=streaming)
        first_row(rows, str(location))
        list(
            tokenized_windows(
                rows,
                "text",
                make_byte_tokenizer(),
                window_rows=100,
                spool=Path(str(location)).parent,
                place="p",
                **options,
            )
        )
    return str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_strings_stay_strings_to_the_letter(tmp_path: Path, name: str, streaming: bool) -> None:
    rows = [row for row in ODD if name != "bom.csv" or "\x00" not in row["prompt"]]
    (tmp_path / name).write_bytes(FILES[name](rows))
    assert [dict(row) for row in read(tmp_path / name, streaming=streaming)] == rows


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("text", ["2024-01-31", "007", "1.50", "true"])
def test_a_column_of_texts_that_look_alike_is_text(tmp_path: Path, suffix: str, text: str) -> None:
    rows = [{"prompt": "a", "chosen": text, "rejected": "x"}] * 3
    (tmp_path / f"a.{suffix}").write_bytes(FILES[f"a.{suffix}"](rows))
    found = tokenize_rows(read(tmp_path / f"a.{suffix}"), "text", make_byte_tokenizer())
    assert [make_byte_tokenizer().decode(row["chosen_ids"]) for row in found] == [text + "<|im_end|>"] * 3


WRONG = {
    "number": (b'{"prompt": "a", "chosen": 5, "rejected": "c"}', "`chosen` is a number, expected text"),
    "null": (b'{"prompt": "a", "chosen": null, "rejected": "c"}', "`chosen` is missing, expected text"),
    "missing": (b'{"prompt": "a", "rejected": "c"}', "`chosen` is missing, expected text"),
    "object": (
        b'{"prompt": "a", "chosen": {"a": 1}, "rejected": "c"}',
        "`chosen` is an object, expected text",
    ),
    "cut": (b'{"prompt": "a", "chosen": "b', "it is an incomplete JSON object (cut before its end)"),
    "cut between values": (b'{"prompt": "a", ', "it is an incomplete JSON object (cut before its end)"),
    "cut before the brace": (b'{"prompt": "a"', "it is an incomplete JSON object (cut before its end)"),
    "cut within a letter": (
        '{"prompt": "a", "chosen": "\u00e9'.encode()[:-1],
        "it is an incomplete JSON object (cut before its end)",
    ),
    "no comma": (b'{"prompt": "a" "chosen": "b"}', "it is not JSON (expecting ',' delimiter)"),
    "no JSON": (b"hello", "it is not JSON (expecting value)"),
    "two": (b'{"prompt": "a"} {"prompt": "b"}', "it is not JSON (extra data)"),
    "list": (b'["a", "b", "c"]', "it is a list, expected an object"),
    "text": (b'"abc"', "it is text, expected an object"),
    "twice": (b'{"prompt": "a", "chosen": "b", "chosen": "x"}', "the name 'chosen' occurs twice"),
    "latin-1": ('{"prompt": "é"}'.encode("latin-1"), "it is not UTF-8 text"),
    "surrogate": (b'{"prompt": "\\ud800", "chosen": "b"}', "it holds half of a surrogate pair"),
    "NUL": (b"\0\0\0", "it is not JSON (expecting value)"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", [1, 3])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named_and_only_that(tmp_path: Path, name: str, place: int, streaming: bool) -> None:
    line, reason = WRONG[name]
    lines = jsonl([TEXT] * 3).splitlines()
    lines[place - 1 : place - 1] = [b"", line]  # a blank line counts, too
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    message = problems_of(tmp_path / "a.jsonl", streaming=streaming)
    assert message.startswith(f"p: 1 row cannot be used (format text):\n  {reason}")
    assert message.endswith(f": 1 row, line {place + 1}\nCorrect or remove them and run again.")


def test_rows_of_a_list_and_records_of_several_lines_are_named_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([TEXT, TEXT, {**TEXT, "chosen": 5}], indent=1))
    assert "`chosen` is a number, expected text: 1 row, line 12\n" in problems_of(
        tmp_path / "a.json", streaming=False
    )
    (tmp_path / "a.csv").write_text(
        'prompt,chosen,rejected\na,"b\nb",c\n\n"a\na",,c\na,b\na,b,c,d\n'
        'a,"Hello" he said,c\na,say "b",c\n"a" ,b,c\n"a,b,c\n'
    )
    message = problems_of(tmp_path / "a.csv", streaming=True)
    for reason in (
        "`chosen` is empty: 1 row, line 5\n",
        "`rejected` is missing, expected text: 1 row, line 7\n",
        "it has 4 cells, but the header names 3 columns: 1 row, line 8\n",
        "it has a quotation mark that is never closed: 1 row, line 12\n",
        "marks is written twice): 2 rows, line 9, 11\n",
    ):
        assert reason in message


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_several_files_are_named_by_file_and_line(tmp_path: Path, streaming: bool) -> None:
    for name, content in (("b.jsonl", [TEXT]), ("c.jsonl", [TEXT, {**TEXT, "chosen": ""}])):
        (tmp_path / name).write_bytes(jsonl(content))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl([{**TEXT, "chosen": ""}, TEXT])))
    reason = "`chosen` is empty: 2 rows, a.jsonl.gz line 1, c.jsonl line 2\n"
    assert reason in problems_of(f"{tmp_path}/*.jsonl*", streaming=streaming)
    both = read_dataset([f"{tmp_path}/c.jsonl", f"{tmp_path}/b.jsonl"], streaming=streaming)["train"]
    assert [row["chosen"] for row in both] == ["b", "", "b"]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_used_are_dropped_and_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"hello\n" + jsonl([TEXT, {**TEXT, "chosen": 5}, TEXT]) + b'{"prompt')
    remarks: list[str] = []
    windows = tokenized_windows(
        read(tmp_path / "a.jsonl", streaming=streaming),
        "text",
        make_byte_tokenizer(),
        window_rows=100,
        spool=tmp_path / "spool",
        place="p",
        on_error="drop",
        log=remarks.append,
    )
    rows = [row for window in windows for row in window]
    assert [row["row"] for row in rows if row["problem"] is None] == [1, 3]
    assert remarks == [
        "p: left out are it is not JSON (expecting value): 1 row, line 1; `chosen` is a number, expected text: "
        "1 row, line 3; it is an incomplete JSON object (cut before its end): 1 row, line 5."
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_later_rows_have_are_known(tmp_path: Path, streaming: bool) -> None:
    rows = [{"instruction": "a"}, {"chosen": "b", "rejected": "c", "instruction": "x"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    found = read(tmp_path / "a.jsonl", streaming=streaming)
    first = first_row(found, "p")
    columns = list(found.column_names or first)
    assert columns == ["instruction", "chosen", "rejected"]
    assert detect_format(columns, first) == "alpaca"
    mapped = read(tmp_path / "a.jsonl", streaming=streaming, rename={"prompt": "instruction"}, limit=1)
    assert list(first_row(mapped, "p"))[-1:] == ["prompt"] and len(list(mapped)) == 1


def test_nulls_of_other_rows_do_not_reach_a_row(tmp_path: Path) -> None:
    calls = [{"arguments": {"city": "Oslo"}}, {"arguments": {"amount": 3}}]
    rows = [{"prompt": [{"role": "user", "tool_calls": [call]}]} for call in calls]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == [row["prompt"] for row in rows]
    assert [row["prompt"] for row in take_rows(rows)["train"]] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a".encode("utf-16"), "the file is UTF-16 text, expected UTF-8; convert it"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "the file is UTF-16 text, expected UTF-8; convert it"),
        (json.dumps({"train": [TEXT], "test": [TEXT]}).encode(), "several lists of rows (train, test)"),
        (gzip.compress(jsonl(ODD))[:-20], "not readable"),
        (zstd(jsonl(ODD))[:-9], "not readable"),
    ],
    ids=["UTF-16", "no mark", "splits", "cut gzip", "cut zstd"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_cannot_be_read_give_one_clear_error(
    tmp_path: Path, content: bytes, problem: str, streaming: bool
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    message = problems_of(tmp_path / "a.jsonl", streaming=streaming)
    assert message.startswith(f"{tmp_path}/a.jsonl") and problem in message


def test_blocks_and_values_larger_than_a_read_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.data.json_records.BLOCK_BYTES", 7)
    monkeypatch.setattr("dpo_cache.data.text_rows.BLOCK_ROWS", 2)
    for name in ("a.jsonl", "spread.json", "one-after-the-other.json", "columns-spread.json"):
        (tmp_path / name).write_bytes(FILES[name](ODD))
        assert [dict(row) for row in read(tmp_path / name)] == ODD
        stream = read(tmp_path / name, streaming=True)
        assert isinstance(stream, TextStream)
        assert [len(window) for window in stream.windows(5)] == [5, 5, 5, 5, 4]


@pytest.mark.parametrize("form", ["file", "stream"])
@pytest.mark.parametrize("streaming", [False, True])
def test_arrow_files_of_both_forms_are_read(tmp_path: Path, form: str, streaming: bool) -> None:
    table = pa.Table.from_pylist(ODD)
    opened = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table)
    assert list(read(tmp_path / "a.arrow", streaming=streaming)) == ODD


def test_a_folder_of_compressed_files_has_its_splits(tmp_path: Path) -> None:
    for split, rows in (("train", ODD), ("test", ODD[:2])):
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(jsonl(rows)))
    found = read_dataset(str(tmp_path), ["train", "test"])
    assert {name: [dict(row) for row in rows] for name, rows in found.items()} == {
        "train": ODD,
        "test": ODD[:2],
    }


DAY = datetime.date(2024, 1, 31)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (5, "`chosen` is a number"), (DAY, "`chosen` is a date"), (b"b", "`chosen` is bytes"),
        (None, "`chosen` is missing"), ({"a": DAY}, "`chosen` is an object"),
        ("\ud800", "it holds half of a surrogate pair"),
    ],
    ids=["int", "date", "bytes", "None", "dict", "surrogate"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["list", "pandas"])
def test_a_wrong_row_in_memory_is_named_and_only_that(kind: str, wrong: Any, reason: str) -> None:
    if kind == "pandas" and isinstance(wrong, str):
        pytest.skip("pandas takes no such text")
    given = [{**TEXT, "when": DAY}, {**TEXT, "chosen": wrong, "when": DAY}, {**TEXT, "when": DAY}]
    rows = take_rows(given if kind == "list" else pd.DataFrame(given))["train"]
    with pytest.raises(DataError) as raised:
        tokenize_rows(rows, "text", make_byte_tokenizer())
    assert str(raised.value).startswith(
        f"the data: 1 row cannot be used (rows are counted from 0, format text):\n  {reason}"
    )
    assert ": 1 row, number 1\n" in str(raised.value)


def test_rows_in_memory_are_plain_values() -> None:
    rows = [
        {"chosen": ("a", np.array([1, 2])), 3: np.float32(0.5)},
        {"chosen": np.array(["x"]), "other": "y"},
    ]
    found = take_rows(rows)["train"]
    assert isinstance(found, TextRows) and found.column_names == ["chosen", "3", "other"]
    assert found.to_list() == [
        {"chosen": ["a", [1, 2]], "3": 0.5, "other": None},
        {"chosen": ["x"], "3": None, "other": "y"},
    ]


def test_frames_of_text_are_read_as_tables() -> None:
    assert take_rows(pd.DataFrame(ODD))["train"].to_list() == ODD
    assert take_rows(pl.DataFrame(ODD))["train"].to_list() == ODD
