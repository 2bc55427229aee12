"""Text that begins like messages and cannot be parsed."""

import datetime
import json
from typing import Any

import numpy as np
import pytest

from dpo_cache.data.broken_messages import find_broken
from tests.data.conftest import assistant, user

ASK, YES = user("Well?"), assistant("It's {so}.")
NUMPY, LITERALS = (
    "as numpy prints them, without commas",
    "as Python prints them, with values that are not literals",
)


def printed(*messages: Any) -> str:
    return str(np.array(messages, dtype=object))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (printed(ASK, YES), NUMPY),
        (printed({"id": 1, **ASK}, {"id": 2, **YES}), NUMPY),
        (printed({"content": "a } {", "at": 3, "role": "user"}, YES), NUMPY),
        (printed({"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}), NUMPY),
        (str([{"id": float("nan"), **ASK}, YES]), LITERALS),
        (str([{**ASK, "at": datetime.datetime(2023, 1, 1)}, YES]), LITERALS),
        (str([{"at": datetime.datetime(2023, 1, 1), **ASK}]), LITERALS),
        (str({"id": float("nan"), **ASK}), LITERALS),
        (str({"messages": np.array([ASK, YES], dtype=object)}), LITERALS),
        (json.dumps([ASK, YES])[:-3], "that are cut off"),
        (json.dumps([{"id": 3, **ASK}, YES])[:-30], "that are cut off"),
        (json.dumps({"messages": [ASK, YES]})[:-3], "that are cut off"),
        (json.dumps(json.dumps([ASK, YES]))[:-8], "that are cut off"),
        (str([ASK, YES])[:-5], "that are cut off"),
        ('[{"role": "user", "content": "a", "id": undefined}]', "but is not JSON"),
        (json.dumps([ASK]) + json.dumps([YES]), "in several pieces of JSON"),
        (json.dumps(ASK) + "\n" + json.dumps(YES), "in several pieces of JSON"),
        (json.dumps([ASK, YES]), None),
        (str([ASK, YES]), None),
        (json.dumps([ASK]) + " is what the API takes. Why?", None),
        ('{"action": "REFUSE"', None),
        ("{ model: x, messages: [{'role': 'user', 'content': 'a'}] }", None),
        ("[{'city': 'Oslo', 'sky': nan}]", None),
        ('{"content": "x', None),
        ("array(3)", None),
        ("a message", None),
        ("", None),
    ],
)
def test_broken_messages_are_told_by_their_start(text: str, kind: str | None) -> None:
    assert find_broken(text) == kind
    assert find_broken(["a", text]) == kind
    assert find_broken(f" {text}") == kind or text.startswith('"')


def test_less_is_enough_in_a_column_of_messages() -> None:
    assert find_broken('{"content": "x', is_sure=True) == "that are cut off"
    assert find_broken('{"content": "x"}', is_sure=True) is None
    assert find_broken(3) is None
