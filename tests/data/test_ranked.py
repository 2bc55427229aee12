"""Rows of several answers with ranks or scores."""

from typing import Any

import pytest

from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.formats import detect_format
from tests.data.conftest import assistant, pair, user

YES_OR_NO = Example([user("Well?")], ([assistant("No.")], [assistant("Yes.")]), ((1, 0),))


def rated(text: str, *, helpful: str, honest: str, **fields: Any) -> dict[str, Any]:
    annotations = {"helpfulness": {"Rating": helpful, "Rationale": "-"}, "honesty": {"Rating": honest}}
    return {"response": text, "model": "m", "annotations": annotations, **fields}


SHAPES: dict[str, tuple[str, dict[str, Any], Example]] = {
    "context and completions (NeMo)": (
        "completions",
        {
            "context": [user("Well?")],
            "completions": [
                {"rank": 1, "completion": [assistant("No.")]},
                {"rank": 0, "completion": [assistant("Yes.")]},
            ],
        },
        YES_OR_NO,
    ),
    "UltraFeedback": (
        "completions",
        {
            "source": "flan",
            "instruction": "Well?",
            "models": ["m", "m"],
            "completions": [
                rated("No.", helpful="5", honest="5", overall_score=3.5),
                rated("Yes.", helpful="1", honest="1", overall_score=8.0),
            ],
        },
        YES_OR_NO,
    ),
    "UltraFeedback with two scores": (
        "completions",
        {
            "instruction": "Well?",
            "completions": [
                {"response": "No.", "overall_score": 9.0, "fine-grained_score": 2.0},
                {
                    "response": "Yes.",
                    "overall_score": 3.0,
                    "fine-grained_score": 4.5,
                    "custom_system_prompt": "Be.",
                },
            ],
        },
        Example(
            [user("Well?")],
            ([assistant("No.")], [assistant("Yes.")]),
            ((1, 0),),
            notes=(
                "its answers are ranked by `fine-grained_score`, not by `overall_score`",
                "`custom_system_prompt` of its answers is left out",
            ),
        ),
    ),
    "UltraFeedback with annotations only": (
        "completions",
        {
            "instruction": "Well?",
            "completions": [rated("No.", helpful="4", honest="2"), rated("Yes.", helpful="3", honest="5")],
        },
        YES_OR_NO,
    ),
    "Nectar": (
        "completions",
        {
            "prompt": "\n\nHuman: Well?\n\nAssistant: ",
            "answers": [
                {"answer": "Yes.", "model": "m", "rank": 1.0},
                {"answer": "No.", "model": "m", "rank": 7.0},
            ],
            "turns": 1,
        },
        pair("\n\nHuman: Well?\n\nAssistant: ", "Yes.", "No."),
    ),
    "stack-exchange-preferences": (
        "completions",
        {
            "qid": 7,
            "question": "Well?",
            "answers": [
                {"answer_id": 1, "pm_score": 0, "selected": False, "text": "No."},
                {"answer_id": 2, "pm_score": 4, "selected": True, "text": "Yes."},
            ],
        },
        YES_OR_NO,
    ),
    "GPT-4-LLM": (
        "completions",
        {
            "user_input": "Well?",
            "responses_and_scores": [
                {"response": "No.", "source": "opt", "score": "2.0"},
                {"response": "Yes.", "source": "gpt4", "score": "10.0"},
            ],
        },
        YES_OR_NO,
    ),
    "an object of lists (ELI5)": (
        "completions",
        {
            "question": "Well?",
            "answers": {"a_id": ["c1", "c2"], "text": ["No.", "Yes."], "score": [3, 9]},
        },
        YES_OR_NO,
    ),
    "messages with a score": (
        "completions",
        {
            "prompt": [user("Well?")],
            "responses": [{**assistant("No."), "score": 1}, {**assistant("Yes."), "score": 2}],
        },
        YES_OR_NO,
    ),
    "whole dialogues with nested scores": (
        "completions",
        {
            "samples": [
                {"messages": [user("Well?"), assistant("No.")], "evals": {"score": 0.0}},
                {"messages": [user("Well?"), assistant("Yes.")], "evals": {"score": 1.0}},
            ]
        },
        YES_OR_NO,
    ),
    "generations and ratings (distilabel)": (
        "ranked",
        {
            "instruction": "Well?",
            "generations": ["No.", "Yes."],
            "ratings": [1.0, 5.0],
            "rationales": ["", ""],
        },
        YES_OR_NO,
    ),
    "question, answers and scores": (
        "ranked",
        {"question": "Well?", "answers": ["No.", "Yes."], "scores": [1, 2]},
        YES_OR_NO,
    ),
    "messages, responses and ranks": (
        "ranked",
        {"messages": [user("Well?")], "responses": ["No.", "Yes."], "ranks": [2, 1]},
        YES_OR_NO,
    ),
}


@pytest.mark.parametrize(("data_format", "row", "example"), SHAPES.values(), ids=SHAPES)
def test_rows_of_each_shape_are_parsed(data_format: str, row: dict[str, Any], example: Example) -> None:
    assert detect_format(list(row), row) == data_format
    assert parse_row(row, data_format) == example


def completions(*scores: Any) -> dict[str, Any]:
    return {
        "prompt": "Well?",
        "completions": [{"text": f" {place}", "score": score} for place, score in enumerate(scores)],
    }


@pytest.mark.parametrize(
    ("scores", "which", "pairs"),
    [
        ((1, 3, 2), "all", ((1, 2), (1, 0), (2, 0))),
        ((1, 3, 2), "best", ((1, 2), (1, 0))),
        ((2, 2, 1), "best", ((0, 2), (1, 2))),
        ((2, 2), "all", ()),
    ],
)
def test_answers_of_equal_score_make_no_pair(
    scores: tuple[int, ...], which: str, pairs: tuple[tuple[int, int], ...]
) -> None:
    example = parse_row(completions(*scores), "completions", which)
    assert isinstance(example, Example)
    assert example.pairs == pairs


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "one answer": (
        completions(1),
        "`completions` is not a list of two answers or more, each with its rank or score",
    ),
    "a score that is not there": (
        completions(1, None),
        "`completions` has no rank or score that all its answers have",
    ),
    "a score that is text": (
        completions(1, "N/A"),
        "`score` in `completions` is text, expected a number",
    ),
    "a score that is true": (
        completions(1, True),
        "`score` in `completions` is true or false, expected a number",
    ),
    "a score that is NaN": (completions(1, "nan"), "`score` in `completions` is NaN, expected a number"),
    "an answer without text": (
        {"prompt": "Well?", "completions": [{"text": "a", "score": 1}, {"score": 2}]},
        "`completions` has an answer without text: expected one of response, completion, answer, text, generation, "
        "output, content, messages, message",
    ),
    "an empty answer": (
        {"prompt": "Well?", "completions": [{"text": "a", "score": 1}, {"text": " ", "score": 2}]},
        "`completions` is empty",
    ),
}


@pytest.mark.parametrize(("row", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_each_unusable_row_gets_its_reason(row: dict[str, Any], reason: str) -> None:
    assert parse_row(row, "completions") == RowProblem(reason)
