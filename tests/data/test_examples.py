import math
from typing import Any

import pytest

from dpo_cache.data.examples import Example, RowProblem, parse_row
from tests.data.conftest import assistant, message, pair, user


def calling(name: str, arguments: dict[str, str]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


TEXT = {"prompt": "Name a colour.", "chosen": " Red.", "rejected": " Seven."}
YES_OR_NO = pair([user("Well?")], [assistant("Yes.")], [assistant("No.")])

FORMATS: dict[str, tuple[str, dict[str, Any], Example]] = {
    "text": ("text", TEXT, pair("Name a colour.", " Red.", " Seven.")),
    "text with other columns": (
        "text",
        {**TEXT, "score": 3, "id": None},
        pair("Name a colour.", " Red.", " Seven."),
    ),
    "prompt and answers as messages": (
        "conversation",
        {"prompt": [user("Well?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        YES_OR_NO,
    ),
    "prompt as text": (
        "conversation",
        {"prompt": "Well?", "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        YES_OR_NO,
    ),
    "prompt as text that the answers repeat": (
        "conversation",
        {
            "prompt": "Well?",
            "chosen": [user("Well?"), assistant("Yes.")],
            "rejected": [user("Well?"), assistant("No.")],
        },
        YES_OR_NO,
    ),
    "prompt as messages that one answer repeats": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [user("Well?"), assistant("Yes.")],
            "rejected": [assistant("No.")],
        },
        YES_OR_NO,
    ),
    "prompt as messages, answers as text": (
        "conversation",
        {"prompt": [user("Well?")], "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "system message without content": (
        "conversation",
        {"prompt": [message("system", ""), user("Well?")], "chosen": "Yes.", "rejected": "No."},
        pair([message("system", ""), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "answers of several turns": (
        "conversation",
        {
            "prompt": "Well?",
            "chosen": [assistant("Yes."), user("Sure?"), assistant("Yes!")],
            "rejected": "No.",
        },
        Example(
            [user("Well?")],
            ([assistant("Yes."), user("Sure?"), assistant("Yes!")], [assistant("No.")]),
            notes=(
                "its dialogues differ before their last turn, so turns from user are scored as parts of its "
                "answers",
            ),
        ),
    ),
    "fields that are null in this row": (
        "conversation",
        {
            "prompt": [{**user("Well?"), "name": None}],
            "chosen": [{**assistant("Yes."), "tool": "x"}],
            "rejected": "No.",
        },
        pair([user("Well?")], [{**assistant("Yes."), "tool": "x"}], [assistant("No.")]),
    ),
    "dialogues as messages": (
        "implicit",
        {
            "chosen": [user("Hi."), assistant("Hi."), user("Well?"), assistant("Yes.")],
            "rejected": [user("Hi."), assistant("Hi."), user("Well?"), assistant("No.")],
        },
        pair([user("Hi."), assistant("Hi."), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "dialogues as text": (
        "implicit",
        {"chosen": "\n\nHuman: Well?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Well?\n\nAssistant: No."},
        pair("\n\nHuman: Well?\n\nAssistant:", " Yes.", " No."),
    ),
    "dialogues as text of several turns": (
        "implicit",
        {
            "chosen": "\n\nHuman: Hi.\n\nAssistant: Hi.\n\nHuman: Well?\n\nAssistant: I think so.",
            "rejected": "\n\nHuman: Hi.\n\nAssistant: Hi.\n\nHuman: Well?\n\nAssistant: I doubt it.",
        },
        pair("\n\nHuman: Hi.\n\nAssistant: Hi.\n\nHuman: Well?\n\nAssistant: I", " think so.", " doubt it."),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Well?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        pair([message("system", "Be brief."), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "sharegpt with plain roles": (
        "sharegpt",
        {
            "conversations": [
                {"from": "user", "value": "Hi."},
                {"from": "assistant", "value": "Hi."},
                {"from": "user", "value": "Well?"},
            ],
            "chosen": {"from": "assistant", "value": "Yes."},
            "rejected": {"from": "assistant", "value": "No."},
        },
        pair([user("Hi."), assistant("Hi."), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Translate.", "input": "Ja.", "chosen": "Yes.", "rejected": "No."},
        pair([user("Translate.\n\nJa.")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "sharegpt with tools": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
                {"from": "observation", "value": "blue"},
            ],
            "chosen": {"from": "gpt", "value": "Fine."},
            "rejected": {
                "from": "function_call",
                "value": '[{"name": "look", "arguments": "{\\"at\\": \\"sea\\"}"}]',
            },
        },
        pair(
            [user("Weather?"), calling("look", {"at": "sky"}), message("tool", "blue")],
            [assistant("Fine.")],
            [calling("look", {"at": "sea"})],
        ),
    ),
    "sharegpt with a system column": (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Well?"}],
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        pair([message("system", "Be brief."), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "question with a system message": (
        "question",
        {"system": "Be brief.", "question": "Well?", "chosen": "Yes.", "rejected": "No."},
        pair([message("system", "Be brief."), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "question with an empty system message": (
        "question",
        {"system": "", "question": "Well?", "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "tools as JSON, and template options": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [assistant("Yes.")],
            "rejected": [assistant("No.")],
            "tools": '[{"name": "look"}]',
            "chat_template_kwargs": {"enable_thinking": False},
        },
        Example(
            [user("Well?")],
            ([assistant("Yes.")], [assistant("No.")]),
            template_options={"tools": [{"name": "look"}], "enable_thinking": False},
        ),
    ),
    "ranked text": (
        "ranked",
        {"prompt": "Well?", "responses": [" No.", " Yes.", " Maybe.", " Eh."], "scores": [1, 9.5, 4, 4]},
        Example("Well?", (" No.", " Yes.", " Maybe.", " Eh."), ((1, 2), (1, 3), (1, 0), (2, 0), (3, 0))),
    ),
    "ranked messages": (
        "ranked",
        {"prompt": [user("Well?")], "responses": [[assistant("No.")], [assistant("Yes.")]], "ranks": [2, 1]},
        Example([user("Well?")], ([assistant("No.")], [assistant("Yes.")]), ((1, 0),)),
    ),
    "ranked alike": (
        "ranked",
        {"prompt": "Well?", "responses": ["a", "b"], "ranks": [1, 1]},
        Example("Well?", ("a", "b"), ()),
    ),
    "prompt that the answers repeat with other spaces": (
        "conversation",
        {"prompt": "Well? ", "chosen": [user("Well?"), assistant("Yes.")], "rejected": [assistant("No.")]},
        pair([user("Well? ")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "conversation with a system column": (
        "conversation",
        {
            "system": "Be brief.",
            "prompt": "Well?",
            "chosen": [assistant("Yes.")],
            "rejected": [assistant("No.")],
        },
        pair([message("system", "Be brief."), user("Well?")], [assistant("Yes.")], [assistant("No.")]),
    ),
    "alpaca with history and system": (
        "alpaca",
        {
            "system": "Be brief.",
            "history": [["Hi.", "Hi!"]],
            "instruction": "Well?",
            "chosen": "Yes.",
            "rejected": "No.",
        },
        pair(
            [message("system", "Be brief."), user("Hi."), assistant("Hi!"), user("Well?")],
            [assistant("Yes.")],
            [assistant("No.")],
        ),
    ),
    "an answer that only calls a tool": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}],
            "rejected": "No.",
        },
        pair(
            [user("Well?")],
            [calling("look", {})],
            [assistant("No.")],
        ),
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Well?", "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "alpaca with empty input": (
        "alpaca",
        {"instruction": "Well?", "input": "", "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
    "alpaca with null input": (
        "alpaca",
        {"instruction": "Well?", "input": None, "chosen": "Yes.", "rejected": "No."},
        YES_OR_NO,
    ),
}


@pytest.mark.parametrize(("data_format", "row", "example"), FORMATS.values(), ids=FORMATS)
def test_rows_of_each_format_are_parsed(data_format: str, row: dict[str, Any], example: Example) -> None:
    assert parse_row(row, data_format) == example


def test_the_best_of_ranked_answers_against_each() -> None:
    row = {"prompt": "Well?", "responses": ["a", "b", "c", "d"], "scores": [3, 1, 3, 2]}
    assert parse_row(row, "ranked", "best") == Example(
        "Well?", ("a", "b", "c", "d"), ((0, 3), (0, 1), (2, 3), (2, 1))
    )


def test_equal_dialogues_keep_an_answer_so_that_the_pair_is_dropped_later() -> None:
    dialogue = [user("Well?"), assistant("Yes.")]
    assert parse_row({"chosen": dialogue, "rejected": dialogue}, "implicit") == pair(
        [user("Well?")], [assistant("Yes.")], [assistant("Yes.")]
    )
    text = parse_row({"chosen": "\n\nHuman: Well?", "rejected": "\n\nHuman: Well?"}, "implicit")
    assert isinstance(text, Example)
    assert text.answers[0] == text.answers[1] != ""


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("A: red cat", "A: red dog"),
        ("A: red cats", "A: red cars"),
        ("A: x", "B: x"),
        ("A: red  cat", "A: red  dog"),
    ],
)
def test_dialogues_as_text_are_cut_without_losing_a_letter(chosen: str, rejected: str) -> None:
    example = parse_row({"chosen": "Q: " + chosen, "rejected": "Q: " + rejected}, "implicit")
    assert isinstance(example, Example)
    assert example.prompt + example.answers[0] == "Q: " + chosen
    assert example.prompt + example.answers[1] == "Q: " + rejected
    assert not example.prompt.endswith("  ")


@pytest.mark.parametrize(
    ("shorter", "longer"),
    [
        ("\n\nHuman: Well?\n\nAssistant: Yes.", "\n\nHuman: Well?\n\nAssistant: Yes. I am sure."),
        (
            [user("Well?"), assistant("Yes.")],
            [user("Well?"), assistant("Yes."), user("Sure?"), assistant("Yes!")],
        ),
    ],
    ids=["text", "messages"],
)
def test_a_dialogue_may_continue_the_other(shorter: Any, longer: Any) -> None:
    example = parse_row({"chosen": longer, "rejected": shorter}, "implicit")
    assert isinstance(example, Example)
    assert example.prompt + example.answers[0] == longer
    assert example.prompt + example.answers[1] == shorter


def test_an_alpaca_input_of_spaces_counts_as_none() -> None:
    assert (
        parse_row({"instruction": "Well?", "input": " ", "chosen": "Yes.", "rejected": "No."}, "alpaca")
        == YES_OR_NO
    )


PROBLEMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty text": ("text", {**TEXT, "chosen": ""}, "`chosen` is empty"),
    "whitespace": ("text", {**TEXT, "rejected": " \n\t"}, "`rejected` is empty"),
    "empty prompt": ("text", {**TEXT, "prompt": ""}, "`prompt` is empty"),
    "none": ("text", {**TEXT, "rejected": None}, "`rejected` is missing, expected text"),
    "number": ("text", {**TEXT, "chosen": 7}, "`chosen` is a number, expected text"),
    "not a number": ("text", {**TEXT, "chosen": float("nan")}, "`chosen` is missing, expected text"),
    "list in a text row": ("text", {**TEXT, "prompt": [user("Well?")]}, "`prompt` is a list, expected text"),
    "number for messages": (
        "conversation",
        {"prompt": "Well?", "chosen": 7, "rejected": "No."},
        "`chosen` is a number, expected messages",
    ),
    "none for messages": (
        "conversation",
        {"prompt": None, "chosen": "Yes.", "rejected": "No."},
        "`prompt` is missing, expected messages",
    ),
    "no messages": ("conversation", {"prompt": [], "chosen": "Yes.", "rejected": "No."}, "`prompt` is empty"),
    "answer that is only the prompt": (
        "conversation",
        {"prompt": "Well?", "chosen": [user("Well?")], "rejected": "No."},
        "`chosen` is empty",
    ),
    "message without role": (
        "conversation",
        {"prompt": [{"content": "Well?"}], "chosen": "Yes.", "rejected": "No."},
        "`prompt` has a message without `role`",
    ),
    "message that is text": (
        "conversation",
        {"prompt": ["Well?"], "chosen": "Yes.", "rejected": "No."},
        "`prompt` has a message without `role`",
    ),
    "message without content": (
        "conversation",
        {"prompt": "Well?", "chosen": [{"role": "assistant"}], "rejected": "No."},
        "`chosen` has a message whose `content` is missing, expected text",
    ),
    "message with an image": (
        "conversation",
        {
            "prompt": "Well?",
            "chosen": "Yes.",
            "rejected": [{"role": "assistant", "content": [{"type": "image"}]}],
        },
        "`rejected` has a message whose `content` has no text, and only text is scored",
    ),
    "message of spaces": (
        "conversation",
        {"prompt": "Well?", "chosen": "Yes.", "rejected": [assistant("  ")]},
        "`rejected` has a message whose `content` is empty",
    ),
    "dialogues that share nothing": (
        "implicit",
        {"chosen": [user("Well?")], "rejected": [user("Who?")]},
        "`chosen` and `rejected` share no prompt: they differ before the first answer",
    ),
    "texts that share nothing": ("implicit", {"chosen": "Well?", "rejected": "No."}, "`prompt` is empty"),
    "a text and a dialogue": (
        "implicit",
        {"chosen": "Well?", "rejected": [user("Well?")]},
        "`rejected` is a list, expected text",
    ),
    "no dialogue": ("implicit", {"chosen": None, "rejected": None}, "`chosen` is missing, expected messages"),
    "turns that are text": (
        "sharegpt",
        {"conversations": "Well?", "chosen": {}, "rejected": {}},
        "`conversations` is not a list of turns",
    ),
    "turn of a stranger": (
        "sharegpt",
        {"conversations": [{"from": "critic", "value": "7"}], "chosen": {}, "rejected": {}},
        "`conversations` has a turn from 'critic', expected one of user, human, prompter, assistant, gpt, "
        "bot, model, chatbot, ai, chatgpt, system, tool, function, observation, ipython, tool_response, "
        "function_response, developer, function_call, tool_call",
    ),
    "turn without value": (
        "sharegpt",
        {"conversations": [{"from": "human"}], "chosen": {}, "rejected": {}},
        "`conversations` has a message whose `value` is missing, expected text",
    ),
    "answers that ask": (
        "conversation",
        {"prompt": "a", "chosen": [user("b"), assistant("c")], "rejected": "d"},
        "`chosen` starts with a message from user, expected the answer, or the whole prompt before it",
    ),
    "one response": (
        "ranked",
        {"prompt": "a", "responses": ["b"], "scores": [1]},
        "`responses` is not a list of two answers or more",
    ),
    "too few scores": (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1]},
        "`scores` has 1 numbers for 2 responses",
    ),
    "no scores": ("ranked", {"prompt": "a", "responses": ["b", "c"]}, "it has neither `scores` nor `ranks`"),
    "scores that are no list": (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "scores": "1 2"},
        "`scores` is text, expected a list of numbers",
    ),
    "a score that is not there": (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, None]},
        "`scores` holds null, expected numbers",
    ),
    "a score that is NaN": (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, math.nan]},
        "`scores` holds NaN, expected numbers",
    ),
    "a rank that is text": (
        "ranked",
        {"prompt": "a", "responses": ["b", "c"], "ranks": ["best", 2]},
        "`ranks` holds text, expected numbers",
    ),
    "a call that is no JSON": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "function_call", "value": "look()"},
            "rejected": {},
        },
        "`chosen` has a turn from 'function_call' that is neither a JSON object with `name` and `arguments` nor "
        "a list of these",
    ),
    "a call without arguments": (
        "sharegpt",
        {
            "conversations": [{"from": "function_call", "value": '{"name": "look"}'}],
            "chosen": {},
            "rejected": {},
        },
        "`conversations` has a turn from 'function_call' that is neither a JSON object with `name` and "
        "`arguments` nor a list of these",
    ),
    "a call of no name": (
        "sharegpt",
        {
            "conversations": [{"from": "function_call", "value": '{"name": null, "arguments": {}}'}],
            "chosen": {},
            "rejected": {},
        },
        "`conversations` has a turn from 'function_call' that is neither a JSON object with `name` and "
        "`arguments` nor a list of these",
    ),
    "arguments that are no object": (
        "sharegpt",
        {
            "conversations": [{"from": "function_call", "value": '{"name": "look", "arguments": "3"}'}],
            "chosen": {},
            "rejected": {},
        },
        "`conversations` has a tool call whose `arguments` are a number, expected an object",
    ),
    "an answer of the user": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "human", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "`chosen` is a turn from 'human', expected one from gpt or function_call",
    ),
    "a conversation that is answered already": (
        "sharegpt",
        {
            "conversations": [{"from": "gpt", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "`conversations` ends with a turn from 'gpt', expected the message that the answers reply to",
    ),
    "an empty response": (
        "ranked",
        {"prompt": "a", "responses": ["b", " "], "scores": [1, 2]},
        "`responses` is empty",
    ),
    "tools that are not JSON": (
        "conversation",
        {"prompt": "a", "chosen": "b", "rejected": "c", "tools": "look"},
        "`tools` is not JSON",
    ),
    "template options that are text": (
        "conversation",
        {"prompt": "a", "chosen": "b", "rejected": "c", "chat_template_kwargs": "x"},
        "`chat_template_kwargs` is text, expected an object",
    ),
    "an answer of others than the assistant": (
        "conversation",
        {"prompt": "a", "chosen": [message("tool", "4")], "rejected": "c"},
        "`chosen` has no message from the assistant",
    ),
    "history that is a number": (
        "alpaca",
        {"history": 7, "instruction": "Well?", "chosen": "Yes.", "rejected": "No."},
        "`history` is not a list of [question, answer]",
    ),
    "no instruction": (
        "alpaca",
        {"instruction": None, "chosen": "Yes.", "rejected": "No."},
        "`instruction` is missing, expected text",
    ),
    "input that is a number": (
        "alpaca",
        {"instruction": "Well?", "input": 7, "chosen": "Yes.", "rejected": "No."},
        "`input` is a number, expected text",
    ),
}


@pytest.mark.parametrize(("data_format", "row", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_each_unusable_row_gets_its_reason(data_format: str, row: dict[str, Any], reason: str) -> None:
    assert parse_row(row, data_format) == RowProblem(reason)
