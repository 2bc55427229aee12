import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dpo_cache.data.examples import Example
from dpo_cache.data.read import take_rows
from dpo_cache.data.unions import (
    KEPT,
    LEFT_OUT,
    nested_columns,
    nested_fields,
    parse_nested_row,
    without_union_nulls,
)
from tests.data.conftest import assistant, user

ROW = {"prompt": [user("Well?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def named(name: str, **args: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": name, "args": args}]}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def through_parquet(rows: list[dict[str, Any]], folder: Path) -> tuple[list[Any], list[tuple[str, ...]]]:
    """The rows as they come out of Parquet without Arrow's nulls, and the notes on each."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, folder / "rows.parquet")
    table = pq.read_table(folder / "rows.parquet")
    nested = nested_fields(table.schema)
    found = [without_union_nulls(row, nested) for row in table.to_pylist()]
    return [row for row, _ in found], [notes for _, notes in found]


CITY, AMOUNT = {"type": "string"}, {"type": "number"}
SAME: dict[str, list[dict[str, Any]]] = {  # rows that come out as they went in, without a note
    "properties": [
        {"tools": [tool("look", city=CITY)]},
        {"tools": [tool("pay", amount=AMOUNT, to={"type": "array", "items": CITY})]},
        {"tools": [tool("wait")]},
        {"tools": None},
        {"tools": []},
    ],
    "keywords": [
        {"tools": [tool("look", city={**CITY, "enum": ["Oslo", None]})]},
        {"tools": [tool("look", city={**CITY, "description": "Where."}), {"name": "bare"}]},
        {"tools": [{"type": "function", "function": {"name": "no", "parameters": {}}}]},
        {"tools": [tool("look", city={"anyOf": [CITY, {"type": "null"}], "minLength": 1})]},
    ],
    "arguments, told by the schema": [
        {
            "tools": [tool("look", city=CITY), tool("pay", amount=AMOUNT)],
            "chosen": [call("look", city="Oslo")],
        },
        {"tools": [tool("look", city=CITY), tool("pay", amount=AMOUNT)], "chosen": [call("pay", amount=5.5)]},
        {"tools": [tool("look", city=CITY), tool("pay", amount=AMOUNT)], "chosen": [call("pay")]},
    ],
    "arguments under another name, told by the schema": [
        {"tools": [tool("look", city=CITY, day=CITY)], "chosen": [named("look", city="Oslo")]},
        {"tools": [tool("look", city=CITY, day=CITY)], "chosen": [named("look", day="Monday")]},
    ],
    "nested arguments, told by the schema": [
        {
            "tools": [tool("look", at={"type": "object", "properties": {"x": AMOUNT, "y": AMOUNT}})],
            "chosen": [call("look", at={"x": 1.5})],
        },
        {
            "tools": [
                tool("look", at={"type": "array", "items": {"type": "object", "properties": {"y": CITY}}})
            ],
            "rejected": [call("look", at=[{"y": "a"}, {}, {"y": "b"}])],
        },
    ],
    "fields of messages": [
        {"chosen": [{**assistant("Yes."), "meta": {"a": 1}}]},
        {"chosen": [{**assistant("Yes."), "meta": {"b": 1}, "name": "Bo"}]},
    ],
    "parts": [
        {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]},
        {"chosen": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
    "JSON": [
        {"tools": json.dumps([tool("look", city={**CITY, "default": None})])},
        {"tools": json.dumps([tool("pay")])},
    ],
    "plain rows": [ROW, {**ROW, "meta": None}, {**ROW, "meta": {"a": 1}}],
}


def without_null_columns(row: Any) -> Any:
    """The row without columns and fields of messages that are null: these mean nothing in any row."""
    if isinstance(row, list):
        return [without_null_columns(entry) for entry in row]
    if isinstance(row, dict) and ("role" in row or row.keys() & {"tools", "chosen", "rejected"}):
        return {name: without_null_columns(value) for name, value in row.items() if value is not None}
    return row


@pytest.mark.parametrize("rows", SAME.values(), ids=SAME)
def test_rows_come_out_of_parquet_as_they_went_in(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    found, notes = through_parquet(rows, tmp_path)
    assert [without_null_columns(row) for row in found] == [without_null_columns(row) for row in rows]
    assert set(notes) == {()}


def test_an_empty_object_is_told_from_null(tmp_path: Path) -> None:
    rows = [{"tools": [tool("wait")]}, {"tools": [tool("look", city=CITY)]}]
    (wait, _), _ = through_parquet(rows, tmp_path)
    assert json.dumps(wait["tools"][0]["function"]["parameters"]) == '{"type": "object", "properties": {}}'


def test_nulls_that_may_be_the_row_s_own_are_left_out_and_noted(tmp_path: Path) -> None:
    """Without a schema, with one that allows null, and in a default."""
    rows = [
        {"chosen": [call("look", city="Oslo")]},
        {"chosen": [call("pay", amount=5)]},
        {"chosen": [call("pay", amount=5, city="Oslo")]},
        {"chosen": [assistant("Yes.")]},
    ]
    found, notes = through_parquet(rows, tmp_path)
    assert [row["chosen"][0]["tool_calls"][0]["function"]["arguments"] for row in found[:3]] == [
        {"city": "Oslo"},
        {"amount": 5},
        {"amount": 5, "city": "Oslo"},
    ]
    assert notes == [(LEFT_OUT,), (LEFT_OUT,), (), ()]


def test_nulls_in_arguments_under_another_name_are_noted(tmp_path: Path) -> None:
    rows = [{"chosen": [named("look", city="Oslo")]}, {"chosen": [named("look", day="Monday")]}]
    assert through_parquet(rows, tmp_path) == (rows, [(LEFT_OUT,), (LEFT_OUT,)])


@pytest.mark.parametrize(
    ("schema", "is_noted"),
    [
        ({"type": "string"}, False),
        ({"type": ["string", "null"]}, True),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, True),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, False),
        ({"type": "string", "nullable": True}, True),
        ({"description": "Where."}, True),
    ],
)
def test_a_schema_tells_whether_null_was_possible(schema: Any, is_noted: bool, tmp_path: Path) -> None:
    tools = json.dumps([tool("look", city=schema, day={"type": "string"})])
    rows = [
        {"tools": tools, "chosen": [call("look", city="Oslo")]},
        {"tools": tools, "chosen": [call("look", day="Monday")]},
    ]
    found, notes = through_parquet(rows, tmp_path)
    assert found[1]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"day": "Monday"}
    assert notes == [(), (LEFT_OUT,) if is_noted else ()]


def test_a_default_of_null_is_left_out_where_other_rows_have_one(tmp_path: Path) -> None:
    rows = [
        {"tools": [tool("look", city={"type": "string", "default": "Oslo"})]},
        {"tools": [tool("look", city={"type": "string", "default": None})]},
    ]
    found, notes = through_parquet(rows, tmp_path)
    assert [row["tools"] for row in found] == [rows[0]["tools"], [tool("look", city=CITY)]]
    assert notes == [(), (LEFT_OUT,)]


@pytest.mark.parametrize(
    "rows",
    [
        [{"tools": [tool("look", city={"type": "string", "default": None})]}] * 2,
        [{"chosen": [call("look", city="Oslo", day=None)]}] * 2,
        [{"chat_template_kwargs": {"day": None}}, {"chat_template_kwargs": {"day": None}}],
    ],
    ids=["default", "arguments", "template options"],
)
def test_a_null_that_no_other_row_explains_is_kept_and_noted(rows: list[Any], tmp_path: Path) -> None:
    found, notes = through_parquet(rows, tmp_path)
    assert found == rows
    assert notes == [(KEPT,)] * 2


def test_template_options_of_other_rows_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"day": "Monday"}},
        {"chat_template_kwargs": None},
    ]
    found, notes = through_parquet(rows, tmp_path)
    assert found == rows
    assert notes == [(LEFT_OUT,), (LEFT_OUT,), ()]


def test_nulls_in_lists_are_kept(tmp_path: Path) -> None:
    rows = [{"chosen": [call("look", at=[1, None], city="x")]}, {"chosen": [call("look", at=[], city="y")]}]
    found, notes = through_parquet(rows, tmp_path)
    assert found == rows
    assert notes == [(), ()]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no JSON type")
def test_values_of_the_type_json_keep_their_nulls() -> None:
    tools = [[tool("look", city={"default": None})], [tool("pay", amount={"default": 3})]]
    for kind in (datasets.Json(), datasets.List(datasets.Json())):
        dataset = Dataset.from_dict({"tools": tools}, features=datasets.Features({"tools": kind}))
        assert nested_columns(dataset).shapes == {}
        assert dataset["tools"][:] == tools


def test_rows_of_plain_messages_are_not_searched() -> None:
    rows = [{**ROW, "meta": {"a": 1}, "chosen": [{**assistant("Yes."), "name": "Bo"}]}, ROW]
    assert nested_fields(pa.Table.from_pylist(rows).schema).shapes == {}


def test_the_notes_are_those_of_the_example() -> None:
    rows = [{**ROW, "chosen": [call("look", city="Oslo")]}, {**ROW, "chosen": [call("pay", amount=5)]}]
    table = pa.Table.from_pylist(rows)
    for row, original in zip(table.to_pylist(), rows, strict=True):
        example = parse_nested_row(row, nested_fields(table.schema), "conversation")
        assert isinstance(example, Example)
        assert example.answers[0] == original["chosen"]
        assert LEFT_OUT in example.notes


TOLD = [{"tools": [tool("look", city=CITY)]}, {"tools": [tool("pay", amount=AMOUNT)]}]
UNTOLD = [{"chosen": [call("look", city="Oslo")]}, {"chosen": [call("pay", amount=5)]}]


def in_memory(rows: Any) -> tuple[list[Any], list[tuple[str, ...]]]:
    """Rows in memory without Arrow's nulls, and the notes on each."""
    (given,) = take_rows(rows).values()
    nested = nested_columns(given)
    found = [without_union_nulls(row, nested) for row in given]
    return [without_null_columns(row) for row, _ in found], [notes for _, notes in found]


@pytest.mark.parametrize("rows", [TOLD, UNTOLD], ids=["told", "untold"])
def test_rows_in_memory_that_differ_in_their_keys_do_not_come_from_arrow(rows: Any) -> None:
    assert in_memory(rows) == (rows, [(), ()])


def test_rows_of_a_table_as_a_list_have_nulls_of_arrow() -> None:
    """A property that is null is no schema, so the list was a table."""
    both = [{**one, **other} for one, other in zip(TOLD, UNTOLD, strict=True)]
    assert in_memory(pa.Table.from_pylist(TOLD).to_pylist()) == (TOLD, [(), ()])
    assert in_memory(Dataset.from_list(both).to_list()) == (both, [(), ()])


def test_nulls_of_rows_in_memory_are_kept_and_noted_if_nothing_tells_whose_they_are() -> None:
    rows = pa.Table.from_pylist(UNTOLD).to_pylist()
    assert in_memory(rows) == (rows, [(KEPT,), (KEPT,)])


def test_a_data_frame_from_parquet_has_nulls_of_arrow(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(UNTOLD), tmp_path / "rows.parquet")
    assert in_memory(pd.read_parquet(tmp_path / "rows.parquet")) == (UNTOLD, [(LEFT_OUT,), (LEFT_OUT,)])
    assert in_memory(pd.DataFrame(UNTOLD)) == (UNTOLD, [(), ()])
