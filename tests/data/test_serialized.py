import json
from typing import Any

import numpy as np
import pytest

from dpo_cache.data.fields import BadRow
from dpo_cache.data.serialized import (
    NOT_JSON,
    READ_AS_TEXT,
    find_messages,
    parse_columns,
    parse_json,
    parse_messages,
)
from tests.data.conftest import assistant, message, user

ASK, YES, NO = [user("Well?")], [assistant("Yes.")], [assistant("No.")]


@pytest.mark.parametrize(
    "write", [json.dumps, str, lambda value: json.dumps(value, indent=1), lambda v: f" {v}\n"]
)
@pytest.mark.parametrize(
    "value",
    [
        ASK,
        [*ASK, *YES],
        {"messages": ASK},
        {"conversations": [{"from": "human", "value": 'It\'s "so"\n\\é?'}]},
        user("Well?"),
        {"from": "gpt", "value": "Yes."},
        [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}],
        [{"content": [{"type": "text", "text": "Well?"}], "role": "user"}],
        [message("critic", "Hm.")],  # refused later, by name
    ],
)
def test_messages_in_text_are_found(value: Any, write: Any) -> None:
    assert parse_messages(write(value)) == value
    assert find_messages(value)


@pytest.mark.parametrize(
    "text",
    [
        '{"action": "REFUSE"}',
        "[1, 2]",
        "[]",
        "{}",
        '[{"role": "user"}]',
        '[{"role": 3, "content": "x"}]',
        '[{"content": "x"}]',
        '[{"from": "Oslo", "to": "Bergen"}]',
        '{"from": "EUR", "value": 5}',
        '[{"role": "user", "content": "x"}, 3]',
        '{"messages": []}',
        '"role": "user"',
        'He wrote [{"role": "user", "content": "x"}]',
        '[{"role": "user", "content": "x"}] is JSON',
        '[{"role": "user", "content": "x"',
        "[{'role': user()}]",
        "[role]",
    ],
)
def test_other_text_is_no_messages(text: str) -> None:
    assert parse_messages(text) is None


def test_objects_of_lists_are_messages() -> None:
    assert find_messages({"role": ["user", "assistant"], "content": ["Well?", "Yes."]}) == [*ASK, *YES]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": null, "b": NaN}', None),
        ("{'a': None, 'b': (1, True)}", {"a": None, "b": [1, True]}),
        ("{'\\d': 1}", {"\\d": 1}),
        ("a, b", NOT_JSON),
        ("{1, 2}", NOT_JSON),
        ("{'a': b'c'}", NOT_JSON),
        ("[" * 100_000, NOT_JSON),
        ("", NOT_JSON),
    ],
)
def test_json_and_python_literals_are_parsed(text: str, value: Any) -> None:
    found = parse_json(text)
    assert (found == value and value is not None) or (found["a"] is None and found["b"] != found["b"])


def columns(**row: Any) -> Any:
    """The columns with each value that is no text as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK, "chosen": YES, "rejected": NO},
        {"prompt": "Well?", "chosen": YES, "rejected": NO},
        {"prompt": "Well?", "chosen": YES, "rejected": "No."},
        {"prompt": ASK, "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Well?", "chosen": ASK + YES, "rejected": ASK + NO},
        {"prompt": "Well?", "chosen": [message("system", "Hm."), *ASK, *YES], "rejected": NO},
        {"chosen": ASK + YES, "rejected": ASK + NO},
        {"question": "Well?", "chosen": YES, "rejected": NO},
        {"instruction": "Well?", "history": [["Hi.", "Hi!"]], "chosen": "Yes.", "rejected": "No."},
        {"prompt": ASK, "responses": ["Yes.", "No."], "scores": [1, 2.5]},
        {"prompt": ASK, "responses": [YES, NO], "ranks": [1, 2]},
    ],
)
def test_every_column_is_parsed(row: dict[str, Any]) -> None:
    assert parse_columns(columns(**row)) == (row, ())
    assert parse_columns(row) == (row, ())


def test_each_ranked_answer_is_parsed() -> None:
    row = {"prompt": "Well?", "responses": [json.dumps(YES), "No."], "scores": [2, 1]}
    assert parse_columns(row) == ({**row, "responses": [YES, "No."]}, ())


@pytest.mark.parametrize(
    "answer",
    [{"action": "REFUSE"}, [1, 2], [{"role": "x"}], {"from": "Oslo", "to": "Bergen"}, {}, [], 3, None],
)
def test_an_answer_that_is_other_json_stays_text(answer: Any) -> None:
    row = columns(prompt="What now?", chosen=answer, rejected="No.")
    assert parse_columns(row) == (row, ())
    as_messages = {**row, "prompt": ASK}
    assert parse_columns(as_messages) == (as_messages, ())


@pytest.mark.parametrize("prompt", ["Write a dialogue as JSON.", [user("Write a dialogue as JSON.")]])
def test_an_answer_that_is_another_dialogue_stays_text_and_is_noted(prompt: Any) -> None:
    row = {"prompt": prompt, "chosen": json.dumps([user("Hi."), assistant("Hi!")]), "rejected": "No."}
    assert parse_columns(row) == (row, (READ_AS_TEXT,))


def test_an_answer_about_money_stays_text_and_is_noted() -> None:
    row = columns(prompt="Five euros?", chosen={"from": "EUR", "value": "5"}, rejected="No.")
    assert parse_columns(row) == (row, (READ_AS_TEXT,))


def test_a_ranked_answer_that_is_another_dialogue_stays_text() -> None:
    other = json.dumps([user("Hi."), assistant("Hi!")])
    row = {"prompt": "Write it as JSON.", "responses": [other, json.dumps(YES)], "scores": [2, 1]}
    assert parse_columns(row) == ({**row, "responses": [other, YES]}, (READ_AS_TEXT,))
    as_text = {**row, "responses": json.dumps(row["responses"])}
    assert parse_columns(as_text) == ({**row, "responses": [other, YES]}, (READ_AS_TEXT,))


def test_rows_of_text_stay_text_and_are_noted() -> None:
    row = columns(prompt=ASK, chosen="Yes.", rejected="No.")
    assert parse_columns(row, is_text=True) == (row, (READ_AS_TEXT,))
    plain = {**row, "prompt": "Well?"}
    assert parse_columns(plain, is_text=True) == (plain, ())


def test_a_context_that_is_a_list_as_json_stays_text() -> None:
    row = {"question": "Which?", "context": "[1, 2]", "chosen": "1", "rejected": "2"}
    assert parse_columns(row) == (row, ())


@pytest.mark.parametrize("column", ["meta", "id", "score_chosen"])
def test_other_columns_are_not_read(column: str) -> None:
    for value in (json.dumps(ASK), PRINTED):
        row = {"prompt": "Well?", "chosen": "Yes.", "rejected": "No.", column: value}
        assert parse_columns(row) == (row, ())


PRINTED = str(np.array([*ASK, *YES], dtype=object))
NUMPY, LITERALS = (
    "as numpy prints them, without commas",
    "as Python prints them, with values that are not literals",
)
CUT = "that are cut off"


@pytest.mark.parametrize(
    ("row", "name", "kind"),
    [
        ({"prompt": PRINTED, "chosen": "Yes.", "rejected": "No."}, "prompt", NUMPY),
        ({"chosen": PRINTED, "rejected": PRINTED}, "chosen", NUMPY),
        ({"prompt": json.dumps(ASK), "chosen": "Yes.", "rejected": json.dumps(YES)[:20]}, "rejected", CUT),
        ({"prompt": ASK, "chosen": "Yes.", "rejected": json.dumps(YES)[:20]}, "rejected", CUT),
        ({"prompt": "Well?", "chosen": PRINTED, "rejected": PRINTED}, "chosen", NUMPY),
        ({"prompt": "Well?", "responses": [PRINTED, PRINTED], "scores": [1, 2]}, "responses", NUMPY),
        ({"prompt": json.dumps(json.dumps(ASK))[:-9], "chosen": "Yes.", "rejected": "No."}, "prompt", CUT),
        ({"question": PRINTED, "chosen": "Yes.", "rejected": "No."}, "question", NUMPY),
    ],
)
@pytest.mark.parametrize("is_text", [False, True])
def test_messages_that_are_no_json_are_refused(row: Any, name: str, kind: str, is_text: bool) -> None:
    with pytest.raises(BadRow) as caught:
        parse_columns(row, is_text=is_text and isinstance(row.get("prompt"), str))
    assert str(caught.value) == f"`{name}` looks like messages {kind}, expected what `json.dumps` writes"


def test_broken_answers_to_a_question_in_text_are_messages_if_both_repeat_it() -> None:
    both = json.dumps([*ASK, *YES])
    for prompt, is_refused in (("Well?", True), ("Which?", False)):
        row = {"prompt": prompt, "chosen": both[:-9], "rejected": both[:-5]}
        if is_refused:
            with pytest.raises(BadRow, match="`chosen` looks like messages that are cut off"):
                parse_columns(row)
        else:
            assert parse_columns(row) == (row, (READ_AS_TEXT,))


def test_a_broken_answer_to_a_question_in_text_stays_text_and_is_noted() -> None:
    row = {"prompt": "Write it as JSON.", "chosen": '[{"role": "assistant", "con', "rejected": "No."}
    assert parse_columns(row) == (row, (READ_AS_TEXT,))
    assert parse_columns(row, is_text=True) == (row, (READ_AS_TEXT,))


def test_messages_that_are_encoded_twice_are_parsed() -> None:
    twice = {
        "prompt": json.dumps(json.dumps(ASK)),
        "chosen": json.dumps(json.dumps(YES)),
        "rejected": "No.",
    }
    assert parse_columns(twice) == ({"prompt": ASK, "chosen": YES, "rejected": "No."}, ())
    assert parse_columns(twice, is_text=True)[1] == (READ_AS_TEXT,)


def test_line_breaks_within_strings_of_json_are_read() -> None:
    assert parse_messages('[{"role": "user", "content": "a\nb"}]') == [user("a\nb")]


def test_messages_without_text_are_messages() -> None:
    for content in (None, {"sky": "blue"}):
        messages = [user("Well?"), {"role": "tool", "content": content}]
        assert parse_messages(json.dumps(messages)) == messages
    assert parse_messages('{"role": "admin", "content": null}') is None
