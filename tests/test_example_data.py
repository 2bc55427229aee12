"""The example data is what its script writes, and no property of an answer by itself separates its pairs."""

import json
from collections import Counter
from pathlib import Path

import pytest

import dpo_cache
from examples.make_pairs import files

DATA = Path(dpo_cache.__file__).parents[1] / "examples" / "data"


def rows(name: str) -> list[dict[str, str]]:
    """Prompt, chosen and rejected answer of each row, as text."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [{key: messages[0]["content"] for key, messages in json.loads(line).items()} for line in lines]


def test_the_files_are_those_of_the_script() -> None:
    assert files() == {path.name: path.read_text(encoding="utf-8") for path in DATA.glob("*.jsonl")}


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_each_answer_is_chosen_as_often_as_rejected(name: str) -> None:
    pairs = rows(name)
    assert Counter(row["chosen"] for row in pairs) == Counter(row["rejected"] for row in pairs)
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in pairs)
    assert shorter == sum(len(row["chosen"]) > len(row["rejected"]) for row in pairs) > len(pairs) / 3


def test_no_question_is_in_both_files() -> None:
    first, second = (
        {row["prompt"].split("?")[0] for row in rows(name)} for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(first) == 48 and len(second) == 20 and not first & second
