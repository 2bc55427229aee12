"""Rows that name both answers, under all names and in all shapes."""

from typing import Any

import pytest

from dpo_cache.data.columns import SIDES
from dpo_cache.data.examples import Example, RowProblem, parse_row
from dpo_cache.data.formats import detect_format
from tests.data.conftest import assistant, message, pair, user

YES_OR_NO = pair([user("Well?")], [assistant("Yes.")], [assistant("No.")])
BRIEF = pair([message("system", "Be brief."), user("Well?")], [assistant("Yes.")], [assistant("No.")])
LATER = pair([user("Hi."), assistant("Hi!"), user("Well?")], [assistant("Yes.")], [assistant("No.")])
SEVERAL = Example(
    [user("Well?")], ([assistant("Yes.")], [assistant("No.")], [assistant("Eh.")]), ((0, 1), (0, 2))
)
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {}}}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

SHAPES: dict[str, tuple[str, dict[str, Any], Example]] = {
    "sharegpt with answers as text (MedicalGPT)": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Well?"}], "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "sharegpt of several turns, with answers as text": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Hi."},
                {"from": "gpt", "value": "Hi!"},
                {"from": "human", "value": "Well?"},
            ],
            "chosen": "Yes.",
            "rejected": "No.",
        },
        LATER,
    ),
    "question with a history (older MedicalGPT)": (
        "question",
        {
            "system": "Be brief.",
            "history": [],
            "question": "Well?",
            "response_chosen": "Yes.",
            "response_rejected": "No.",
        },
        BRIEF,
    ),
    "query, response and rejected_response (older ms-swift)": (
        "question",
        {"query": "Well?", "response": "Yes.", "rejected_response": "No.", "history": [["Hi.", "Hi!"]]},
        LATER,
    ),
    "messages and rejected_response (ms-swift)": (
        "swift",
        {"messages": [user("Well?"), assistant("Yes.")], "rejected_response": "No."},
        YES_OR_NO,
    ),
    "messages with a system column and rejected_response": (
        "swift",
        {
            "system": "Be brief.",
            "messages": [user("Well?"), assistant("Yes.")],
            "rejected_response": "No.",
            "images": None,
        },
        BRIEF,
    ),
    "messages and several rejected responses": (
        "swift",
        {"messages": [user("Well?"), assistant("Yes.")], "rejected_response": ["No.", "Eh."]},
        SEVERAL,
    ),
    "messages and rejected_messages (ms-swift)": (
        "swift",
        {
            "messages": [user("Hi."), assistant("Hi!"), user("Well?"), assistant("Yes.")],
            "rejected_messages": [user("Hi."), assistant("Hi!"), user("Well?"), assistant("No.")],
        },
        LATER,
    ),
    "a system message in messages only": (
        "swift",
        {
            "messages": [message("system", "Be brief."), user("Well?"), assistant("Yes.")],
            "rejected_messages": [message("system", "Be brief."), user("Well?"), assistant("No.")],
        },
        BRIEF,
    ),
    "messages to answer (Axolotl)": (
        "messages",
        {"messages": [user("Well?")], "chosen": assistant("Yes."), "rejected": assistant("No.")},
        YES_OR_NO,
    ),
    "messages to answer, with answers as text": (
        "messages",
        {"system": "Be brief.", "messages": [user("Well?")], "chosen": "Yes.", "rejected": "No."},
        BRIEF,
    ),
    "messages that end with the chosen answer": (
        "messages",
        {"messages": [user("Well?"), assistant("Yes.")], "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "messages that end with the chosen message": (
        "messages",
        {
            "messages": [user("Well?"), assistant("Yes.")],
            "chosen": assistant("Yes."),
            "rejected": assistant("No."),
        },
        YES_OR_NO,
    ),
    "turns that end with the chosen turn": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Yes."}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        YES_OR_NO,
    ),
    "whole dialogues next to messages": (
        "implicit",
        {
            "messages": [user("Well?"), assistant("Yes.")],
            "chosen": [user("Well?"), assistant("Yes.")],
            "rejected": [user("Well?"), assistant("No.")],
        },
        YES_OR_NO,
    ),
    "context as messages": (
        "messages",
        {"context": [user("Well?")], "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "context as text is no prompt": (
        "question",
        {"context": "Rain.", "question": "Well?", "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "ultrafeedback_binarized": (
        "conversation",
        {
            "prompt": "Well?",
            "prompt_id": "7f",
            "chosen": [user("Well?"), assistant("Yes.")],
            "rejected": [user("Well?"), assistant("No.")],
            "messages": [user("Well?"), assistant("Yes.")],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        },
        YES_OR_NO,
    ),
    "instruction with chosen_response and rejected_response (Argilla)": (
        "alpaca",
        {
            "source": "flan",
            "instruction": "Well?",
            "chosen_response": "Yes.",
            "rejected_response": "No.",
            "chosen-rating": 5.0,
        },
        YES_OR_NO,
    ),
    "input with a system message (Argilla)": (
        "question",
        {
            "system": "Be brief.",
            "input": "Well?",
            "chosen": "Yes.",
            "rejected": "No.",
            "generations": ["Yes.", "No."],
            "rating": [9.0, 7.0],
        },
        BRIEF,
    ),
    "one message and several rejected ones": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": assistant("Yes."),
            "rejected": [assistant("No."), assistant("Eh.")],
        },
        SEVERAL,
    ),
    "a list of one message and several rejected ones": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [assistant("Yes.")],
            "rejected": [assistant("No."), assistant("Eh.")],
        },
        SEVERAL,
    ),
    "a dialogue and several rejected messages": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [user("Well?"), assistant("Yes.")],
            "rejected": [assistant("No."), assistant("Eh.")],
        },
        SEVERAL,
    ),
    "text and several rejected messages": (
        "conversation",
        {"prompt": "Well?", "chosen": "Yes.", "rejected": [assistant("No."), assistant("Eh.")]},
        SEVERAL,
    ),
    "question and several rejected messages": (
        "question",
        {"question": "Well?", "chosen": "Yes.", "rejected": [assistant("No."), assistant("Eh.")]},
        SEVERAL,
    ),
    "answers of two messages each": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [assistant("Hm."), assistant("Yes.")],
            "rejected": [assistant("Eh."), assistant("No.")],
        },
        Example(
            [user("Well?")],
            ([assistant("Hm."), assistant("Yes.")], [assistant("Eh."), assistant("No.")]),
        ),
    ),
    "an answer that calls a tool": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": "Yes.",
            "rejected": [{**assistant("Eh."), "tool_calls": CALLS}, assistant("No.")],
        },
        Example(
            [user("Well?")],
            ([assistant("Yes.")], [{**assistant("Eh."), "tool_calls": CALLS}, assistant("No.")]),
        ),
    ),
    "one turn and several rejected ones": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Well?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": [{"from": "gpt", "value": "No."}, {"from": "gpt", "value": "Eh."}],
        },
        SEVERAL,
    ),
    "conversations with the chosen answer and rejected_response": (
        "swift",
        {
            "conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Yes."}],
            "rejected_response": "No.",
        },
        YES_OR_NO,
    ),
    "rejected_messages that do not repeat the prompt": (
        "swift",
        {"messages": [user("Well?"), assistant("Yes.")], "rejected_messages": [assistant("No.")]},
        YES_OR_NO,
    ),
    "answers as objects (Nectar-Ranked-DPO)": (
        "text",
        {
            "prompt": "Well?",
            "chosen": {"answer": "Yes.", "model": "m", "rank": 1.0},
            "rejected": {"answer": "No.", "model": "m", "rank": 7.0},
        },
        pair("Well?", "Yes.", "No."),
    ),
    "stack-exchange-paired": (
        "question",
        {"qid": 7, "question": "Well?", "response_j": "Yes.", "response_k": "No."},
        YES_OR_NO,
    ),
    "text with several rejected answers": (
        "text",
        {"prompt": "Well?", "chosen": " Yes.", "rejected": [" No.", " Eh."]},
        Example("Well?", (" Yes.", " No.", " Eh."), ((0, 1), (0, 2))),
    ),
    "text with several answers of each kind": (
        "text",
        {"prompt": "Well?", "chosen": [" Yes.", " Aye."], "rejected": [" No.", " Eh."]},
        Example("Well?", (" Yes.", " Aye.", " No.", " Eh."), ((0, 2), (0, 3), (1, 2), (1, 3))),
    ),
    "text with answers in lists of one": (
        "text",
        {"prompt": "Well?", "chosen": [" Yes."], "rejected": [" No."]},
        pair("Well?", " Yes.", " No."),
    ),
    "messages with several rejected answers": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [assistant("Yes.")],
            "rejected": [[assistant("No.")], [assistant("Eh.")]],
        },
        SEVERAL,
    ),
    "several rejected answers as text": (
        "conversation",
        {"prompt": [user("Well?")], "chosen": [assistant("Yes.")], "rejected": ["No.", "Eh."]},
        SEVERAL,
    ),
    "question with several rejected answers": (
        "question",
        {"question": "Well?", "chosen": "Yes.", "rejected": ["No.", "Eh."]},
        SEVERAL,
    ),
    "alpaca with several rejected answers": (
        "alpaca",
        {"instruction": "Well?", "chosen": "Yes.", "rejected": ["No.", "Eh."]},
        SEVERAL,
    ),
    "sharegpt with several rejected answers": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Well?"}],
            "chosen": "Yes.",
            "rejected": ["No.", "Eh."],
        },
        SEVERAL,
    ),
    "output with two answers (older LLaMA-Factory)": (
        "output",
        {"instruction": "Well?", "input": "", "output": ["Yes.", "No."]},
        YES_OR_NO,
    ),
    "output with two answers, input, history and system": (
        "output",
        {
            "system": "Be brief.",
            "history": [["Hi.", "Hi!"]],
            "instruction": "Well?",
            "input": "Really?",
            "output": ["Yes.", "No."],
        },
        pair(
            [message("system", "Be brief."), user("Hi."), assistant("Hi!"), user("Well?\n\nReally?")],
            [assistant("Yes.")],
            [assistant("No.")],
        ),
    ),
    "OpenAI's preference fine-tuning": (
        "openai",
        {
            "input": {"messages": [user("Well?")], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [assistant("Yes.")],
            "non_preferred_output": [assistant("No.")],
        },
        Example(
            [user("Well?")], ([assistant("Yes.")], [assistant("No.")]), template_options={"tools": [TOOL]}
        ),
    ),
}


@pytest.mark.parametrize(("data_format", "row", "example"), SHAPES.values(), ids=SHAPES)
def test_rows_of_each_shape_are_parsed(data_format: str, row: dict[str, Any], example: Example) -> None:
    assert detect_format(list(row), row) == data_format
    assert parse_row(row, data_format) == example


@pytest.mark.parametrize(("chosen", "rejected"), SIDES)
@pytest.mark.parametrize(
    ("prompt", "data_format"), [("prompt", "text"), ("question", "question"), ("instruction", "alpaca")]
)
def test_answers_have_many_names(prompt: str, data_format: str, chosen: str, rejected: str) -> None:
    row = {prompt: "Well?", chosen: "Yes.", rejected: "No."}
    assert detect_format(list(row), row) == data_format
    assert parse_row(row, data_format) == parse_row(
        {prompt: "Well?", "chosen": "Yes.", "rejected": "No."}, data_format
    )


@pytest.mark.parametrize(("chosen", "rejected"), SIDES)
def test_a_missing_answer_is_named_as_the_other_one(chosen: str, rejected: str) -> None:
    if rejected == "rejected" and chosen != "chosen":
        return  # `rejected` belongs to `chosen`
    row = {"prompt": "Well?", chosen: "Yes.", rejected: None}
    assert parse_row(row, "text") == RowProblem(f"`{rejected}` is missing, expected text")


PROBLEMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "messages that end with a question": (
        "swift",
        {"messages": [user("Well?")], "rejected_response": "No."},
        "`messages` ends with a message from user, expected the chosen answer, from assistant",
    ),
    "no messages": (
        "swift",
        {"messages": [], "rejected_response": "No."},
        "`messages` ends with nothing, expected the chosen answer, from assistant",
    ),
    "one message": (
        "swift",
        {"messages": [assistant("Yes.")], "rejected_response": "No."},
        "`prompt` is empty",
    ),
    "no rejected answers": (
        "text",
        {"prompt": "Well?", "chosen": "Yes.", "rejected": []},
        "`rejected` is a list, expected text",
    ),
    "an empty rejected answer": (
        "text",
        {"prompt": "Well?", "chosen": "Yes.", "rejected": ["No.", " "]},
        "`rejected` is empty",
    ),
    "three outputs": (
        "output",
        {"instruction": "Well?", "output": ["a", "b", "c"]},
        "`output` is 3 answers, expected a list of two: the chosen answer and the rejected one",
    ),
    "one output": (
        "output",
        {"instruction": "Well?", "output": "a"},
        "`output` is text, expected a list of two: the chosen answer and the rejected one",
    ),
    "messages that are answered already": (
        "messages",
        {"messages": [user("Well?"), assistant("Eh.")], "chosen": "Yes.", "rejected": "No."},
        "`messages` ends with a message from assistant, expected the message that the answers reply to",
    ),
}


@pytest.mark.parametrize(("data_format", "row", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_each_unusable_row_gets_its_reason(data_format: str, row: dict[str, Any], reason: str) -> None:
    assert parse_row(row, data_format) == RowProblem(reason)
