"""Rows of two answers and a verdict."""

from typing import Any

import pytest

from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.formats import detect_format
from dpo_cache.errors import DataError
from tests.data.conftest import assistant, user

NO, YES = [user("Well?"), assistant("No.")], [user("Well?"), assistant("Yes.")]
TEXT = Example("Well?", ("No.", "Yes."), ((1, 0),))
CHAT = Example([user("Well?")], ([assistant("No.")], [assistant("Yes.")]), ((1, 0),))

SHAPES: dict[str, tuple[dict[str, Any], Example]] = {
    "PKU-SafeRLHF": (
        {"prompt": "Well?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 1},
        TEXT,
    ),
    "PKU-SafeRLHF, the safer one": (
        {"prompt": "Well?", "response_0": "No.", "response_1": "Yes.", "safer_response_id": 1},
        TEXT,
    ),
    "PKU-SafeRLHF with a choice": (
        {
            "prompt": "Well?",
            "response_0": "No.",
            "response_1": "Yes.",
            "better_response_id": 0,
            "preference": 1,
        },
        TEXT,
    ),
    "alpaca_farm": (
        {"instruction": "Well?", "input": "", "output_1": "No.", "output_2": "Yes.", "preference": 2},
        CHAT,
    ),
    "numbers that CSV holds": (
        {"prompt": "Well?", "response_0": "No.", "response_1": "Yes.", "better_response_id": "1.0"},
        TEXT,
    ),
    "letters": (
        {"prompt": "Well?", "response_a": "No.", "response_b": "Yes.", "preference": "B"},
        TEXT,
    ),
    "the name of the column": (
        {"prompt": "Well?", "response_a": "No.", "response_b": "Yes.", "winner": "response_b"},
        TEXT,
    ),
    "the name of the model": (
        {
            "prompt": "Well?",
            "response_a": "No.",
            "response_b": "Yes.",
            "model_a": "small",
            "model_b": "large",
            "winner": "large",
        },
        TEXT,
    ),
    "chatbot_arena_conversations": (
        {
            "question_id": "7f",
            "model_a": "small",
            "model_b": "large",
            "winner": "model_b",
            "conversation_a": NO,
            "conversation_b": YES,
            "turn": 1,
        },
        CHAT,
    ),
    "lmsys-arena-human-preference-55k": (
        {
            "prompt": '["Well?"]',
            "response_a": '["No."]',
            "response_b": '["Yes."]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        CHAT,
    ),
    "HelpSteer 2": (
        {"prompt": "Well?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 2},
        TEXT,
    ),
    "HelpSteer 3": (
        {"context": [user("Well?")], "response1": "No.", "response2": "Yes.", "overall_preference": 1},
        CHAT,
    ),
    "a list of two answers": (
        {"prompt": "Well?", "responses": ["No.", "Yes."], "better_response_id": 1},
        TEXT,
    ),
    "a list of two dialogues": ({"responses": [NO, YES], "chosen": 1}, CHAT),
    "SHP": (
        {
            "history": "Well?",
            "human_ref_A": "No.",
            "human_ref_B": "Yes.",
            "labels": 0,
            "score_A": 2,
            "score_B": 9,
        },
        CHAT,
    ),
    "WebGPT": (
        {
            "question": {"dataset": "eli5", "id": "7", "full_text": "Well?"},
            "answer_0": "No.",
            "score_0": -0.5,
            "answer_1": "Yes.",
            "score_1": 0.5,
        },
        CHAT,
    ),
    "Unified-Feedback": (
        {"conv_A": NO, "conv_B": YES, "conv_A_rating": 1.0, "conv_B_rating": 2.0, "num_turns": 2},
        CHAT,
    ),
}


@pytest.mark.parametrize(("row", "example"), SHAPES.values(), ids=SHAPES)
def test_rows_of_each_shape_are_parsed(row: dict[str, Any], example: Example) -> None:
    assert detect_format(list(row), row) == "compared"
    assert parse_row(row, "compared") == example


def letters(**verdict: Any) -> dict[str, Any]:
    return {"prompt": "Well?", "response_a": "No.", "response_b": "Yes.", **verdict}


def numbers(**verdict: Any) -> dict[str, Any]:
    return {"prompt": "Well?", "response_1": "No.", "response_2": "Yes.", **verdict}


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        (letters(winner="model_a"), ((0, 1),)),
        (letters(winner="A"), ((0, 1),)),
        (letters(winner="tie"), ()),
        (letters(label="model_a"), ((0, 1),)),
        (letters(label="B>A"), ((1, 0),)),
        (letters(label="A>>B"), ((0, 1),)),
        (letters(label="A=B"), ()),
        (letters(winner="tie (bothbad)"), ()),
        (letters(winner_model_a=1, winner_model_b=0, winner_tie=0), ((0, 1),)),
        (letters(winner_model_a=0, winner_model_b=0, winner_tie=1), ()),
        (letters(score_a=3, score_b=3), ()),
        (letters(score_a="3", score_b="2.5"), ((0, 1),)),
        (numbers(preference=1), ((0, 1),)),
        (numbers(preference="2"), ((1, 0),)),
        (numbers(preference_strength=-3), ((0, 1),)),
        (numbers(preference_strength=0), ()),
        (numbers(preference_strength="-1"), ((0, 1),)),
    ],
)
def test_verdicts_of_every_kind_are_read(row: dict[str, Any], pairs: tuple[tuple[int, int], ...]) -> None:
    assert detect_format(list(row), row) == "compared"
    example = parse_row(row, "compared")
    assert isinstance(example, Example)
    assert example.pairs == pairs


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (letters(winner=1), "`winner` is '1', expected a or b (for `response_a` and `response_b`), or tie"),
        (
            numbers(preference=0),
            "`preference` is '0', expected 1 or 2 (for `response_1` and `response_2`), or tie",
        ),
        (
            numbers(preference=1.5),
            "`preference` is '1.5', expected 1 or 2 (for `response_1` and `response_2`), or tie",
        ),
        (
            {"prompt": "Well?", "responses": ["No.", "Yes."], "chosen": 2},
            "`chosen` is '2', expected 0 or 1 (for the answers in `responses`), or tie",
        ),
        (
            letters(label=1),
            "no column tells which of `response_a` and `response_b` is better: name one that holds a or b with "
            "`map`, for example `map` preference=choice",
        ),
        (letters(winner=None), "`winner` is missing, expected a or b"),
        (letters(winner=True), "`winner` is true or false, expected a or b"),
        (letters(score_a=3, score_b=None), "`score_b` is missing, expected a number"),
        ({**letters(winner="a"), "response_b": " "}, "`response_b` is empty"),
        ({"response_a": "No.", "response_b": "Yes.", "winner": "a"}, "`prompt` is empty"),
    ],
)
def test_each_unusable_row_gets_its_reason(row: dict[str, Any], reason: str) -> None:
    assert parse_row(row, "compared") == RowProblem(reason)


def test_two_verdicts_need_a_choice() -> None:
    row = {
        "prompt": "a",
        "response_0": "b",
        "response_1": "c",
        "better_response_id": 0,
        "safer_response_id": 1,
    }
    with pytest.raises(DataError) as caught:
        detect_format(list(row), row)
    assert str(caught.value) == (
        "the data: `better_response_id` and `safer_response_id` may prefer different answers: choose one with `map`, "
        "for example `map` preference=better_response_id.\n"
        "It has the columns prompt, response_0, response_1, better_response_id, safer_response_id."
    )


def test_multi_turn_dialogues_may_be_lists_of_each_speakers_turns() -> None:
    row = {
        "prompt": '["Hi.", "Well?"]',
        "response_a": '["Hi!", "No."]',
        "response_b": '["Hi!", "Yes."]',
        "winner": "b",
    }
    assert parse_row(row, "compared") == Example(
        [user("Hi."), assistant("Hi!"), user("Well?")], ([assistant("No.")], [assistant("Yes.")]), ((1, 0),)
    )
