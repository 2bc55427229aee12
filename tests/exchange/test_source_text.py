"""Rows of text as TRL reads them, made again from rows of every format."""

import json

from dpo_cache.data.examples import Example, parse_row
from dpo_cache.exchange.source_text import _text_row
from tests.data.test_two_sides import SHAPES, TOOL


def test_tools_within_a_prompt_are_exported() -> None:
    data_format, row, example = SHAPES["OpenAI's preference fine-tuning"]
    exported = _text_row(example, (0, 1))
    assert json.loads(exported.pop("tools")) == [TOOL]
    again = parse_row(exported | {"tools": [TOOL]}, "conversation")
    assert isinstance(again, Example) and again == parse_row(row, data_format)


def test_each_pair_of_several_answers_is_a_row() -> None:
    _, _, example = SHAPES["text with several answers of each kind"]
    assert [_text_row(example, pair) for pair in example.pairs] == [
        {"prompt": "Well?", "chosen": chosen, "rejected": rejected}
        for chosen in (" Yes.", " Aye.")
        for rejected in (" No.", " Eh.")
    ]
