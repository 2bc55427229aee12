"""Nulls that pandas and `datasets` write into JSON are kept and noted."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dpo_cache.data.examples import Example, parse_row
from dpo_cache.data.json_nulls import IN_JSON, has_odd_nulls
from dpo_cache.data.read import read_dataset
from dpo_cache.data.unions import nested_columns, parse_nested_row
from tests.data.conftest import assistant, user

CITY = {"type": "string"}


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": arguments}]}


def tool(**properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "look", "parameters": parameters}}


@pytest.mark.parametrize(
    ("tools", "answer", "is_odd"),
    [
        ([], call(city="Oslo"), False),
        ([], call(city=None), True),
        ([], call(at={"city": None}), True),
        ([], call(at=[{"city": None}]), True),
        ([], call(at=[None]), False),
        ([], call(), False),
        ([tool(city=CITY)], call(city="Oslo"), False),
        ([tool(city=CITY)], call(city=None), True),
        ([tool(city={"type": ["string", "null"]})], call(city=None), False),
        ([tool(city=CITY)], call(city="Oslo", day=None), True),
        ([tool(at={"type": "array", "items": tool(x=CITY)["function"]["parameters"]})], call(at=[{"x": None}]), True),
        ([tool(city=CITY, day=None)], assistant("Yes."), True),
        ([tool(city={**CITY, "description": None})], assistant("Yes."), True),
        ([tool(city={**CITY, "default": None, "enum": ["Oslo", None]})], assistant("Yes."), False),
        ([tool(at={"type": "object", "default": {"city": None}})], assistant("Yes."), False),
    ],
)  # fmt: skip
def test_nulls_that_no_schema_explains_are_odd(tools: Any, answer: Any, is_odd: bool) -> None:
    row = {"prompt": [user("Well?")], "chosen": [answer], "rejected": [assistant("No.")], "tools": tools}
    example = parse_row(row, "conversation")
    assert isinstance(example, Example)
    assert has_odd_nulls(example) == is_odd


def test_rows_that_datasets_writes_as_json_are_noted(tmp_path: Path) -> None:
    rows = [
        {"prompt": [user("Well?")], "chosen": [call(**arguments)], "rejected": [call()]}
        for arguments in ({"city": "Oslo"}, {"day": "Monday"})
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_json(tmp_path / "arrow.jsonl")
    for name, notes in (("own", ()), ("arrow", (IN_JSON,))):
        (found,) = read_dataset(str(tmp_path / f"{name}.jsonl")).values()
        nested = nested_columns(found)
        for row in found:
            example = parse_nested_row(row, nested, "conversation")
            assert isinstance(example, Example)
            assert example.notes == notes
