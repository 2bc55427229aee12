import math
from typing import Any

import pytest
from datasets import Dataset

from dpo_cache.data import check_format, detect_format, tokenize_rows
from dpo_cache.data.formats import Example, RowProblem, parse_row, unused_columns
from dpo_cache.errors import DataError
from tests.data.conftest import assistant, make_byte_tokenizer, message, pair, user


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
        pair([user("Well?")], [assistant("Yes."), user("Sure?"), assistant("Yes!")], [assistant("No.")]),
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
    "tools as JSON, and what the template is told": (
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
    "an answer that calls a tool and says nothing": (
        "conversation",
        {
            "prompt": [user("Well?")],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}],
            "rejected": "No.",
        },
        pair(
            [user("Well?")],
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}],
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
def test_each_format_is_recognised_and_parsed(
    data_format: str, row: dict[str, Any], example: Example
) -> None:
    assert detect_format(list(row), row) == data_format
    assert parse_row(row, data_format) == example


@pytest.mark.parametrize(("data_format", "row", "example"), FORMATS.values(), ids=FORMATS)
def test_a_format_may_be_named(data_format: str, row: dict[str, Any], example: Example) -> None:
    assert check_format(data_format, list(row)) == data_format


def test_the_best_of_ranked_answers_against_each() -> None:
    row = {"prompt": "Well?", "responses": ["a", "b", "c", "d"], "scores": [3, 1, 3, 2]}
    assert parse_row(row, "ranked", "best") == Example(
        "Well?", ("a", "b", "c", "d"), ((0, 3), (0, 1), (2, 3), (2, 1))
    )


def test_a_prompt_column_beside_an_instruction_is_the_prompt() -> None:
    assert detect_format(["instruction", *TEXT], TEXT) == "text"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(["question", "answer"], "question, answer"), (["prompt", "chosen"], "prompt, chosen"), ([], "(none)")],
)
def test_what_is_no_preference_data_is_told_what_is_accepted(columns: list[str], shown: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(columns, {})
    assert str(caught.value) == (
        f"the data is not preference data: found the columns {shown}; accepted are\n"
        "  prompt, chosen, rejected                    (text, or messages with role and content)\n"
        "  chosen, rejected                            (whole dialogues that share the prompt)\n"
        "  conversations, chosen, rejected             (ShareGPT: from and value)\n"
        "  instruction, input, chosen, rejected        (Alpaca)\n"
        "  system, question, chosen, rejected\n"
        "  prompt, responses, scores or ranks          (ranked answers)\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question, or rename them."
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
def test_a_dialogue_may_go_on_where_the_other_ends(shorter: Any, longer: Any) -> None:
    example = parse_row({"chosen": longer, "rejected": shorter}, "implicit")
    assert isinstance(example, Example)
    assert example.prompt + example.answers[0] == longer
    assert example.prompt + example.answers[1] == shorter


def test_an_alpaca_input_of_spaces_is_as_good_as_none() -> None:
    assert (
        parse_row({"instruction": "Well?", "input": " ", "chosen": "Yes.", "rejected": "No."}, "alpaca")
        == YES_OR_NO
    )


PROBLEMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "empty text": ("text", {**TEXT, "chosen": ""}, "`chosen` is empty"),
    "whitespace": ("text", {**TEXT, "rejected": " \n\t"}, "`rejected` is empty"),
    "empty prompt": ("text", {**TEXT, "prompt": ""}, "`prompt` is empty"),
    "none": ("text", {**TEXT, "rejected": None}, "`rejected` is missing, expected text"),
    "number": ("text", {**TEXT, "chosen": 7}, "`chosen` is a int, expected text"),
    "not a number": ("text", {**TEXT, "chosen": float("nan")}, "`chosen` is a float, expected text"),
    "list in a text row": ("text", {**TEXT, "prompt": [user("Well?")]}, "`prompt` is a list, expected text"),
    "number for messages": (
        "conversation",
        {"prompt": "Well?", "chosen": 7, "rejected": "No."},
        "`chosen` is a int, expected messages",
    ),
    "none for messages": (
        "conversation",
        {"prompt": None, "chosen": "Yes.", "rejected": "No."},
        "`prompt` is missing, expected messages",
    ),
    "no messages": ("conversation", {"prompt": [], "chosen": "Yes.", "rejected": "No."}, "`prompt` is empty"),
    "answer that is the prompt alone": (
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
        "`rejected` has a message whose `content` is a list, expected text",
    ),
    "message of spaces": (
        "conversation",
        {"prompt": "Well?", "chosen": "Yes.", "rejected": [assistant("  ")]},
        "`rejected` has a message whose `content` is empty",
    ),
    "dialogues that share nothing": (
        "implicit",
        {"chosen": [user("Well?")], "rejected": [user("Who?")]},
        "`prompt` is empty",
    ),
    "texts that share nothing": ("implicit", {"chosen": "Well?", "rejected": "No."}, "`prompt` is empty"),
    "a text beside a dialogue": (
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
        "`conversations` has a turn from 'critic', expected one of human, gpt, user, assistant, system, "
        "function_call, observation, tool",
    ),
    "answer that is no turn": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Well?"}], "chosen": "Yes.", "rejected": "No."},
        "`chosen` has a message without `from`",
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
        "`scores` is a str, expected a list of numbers",
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
        "`ranks` holds a str, expected numbers",
    ),
    "a call that is no JSON": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "function_call", "value": "look()"},
            "rejected": {},
        },
        "`chosen` has a turn from 'function_call' that is no JSON object with `name` and `arguments`, nor "
        "a list of these",
    ),
    "a call without arguments": (
        "sharegpt",
        {
            "conversations": [{"from": "function_call", "value": '{"name": "look"}'}],
            "chosen": {},
            "rejected": {},
        },
        "`conversations` has a turn from 'function_call' that is no JSON object with `name` and "
        "`arguments`, nor a list of these",
    ),
    "a call of no name": (
        "sharegpt",
        {
            "conversations": [{"from": "function_call", "value": '{"name": null, "arguments": {}}'}],
            "chosen": {},
            "rejected": {},
        },
        "`conversations` has a turn from 'function_call' that is no JSON object with `name` and "
        "`arguments`, nor a list of these",
    ),
    "arguments that are no object": (
        "sharegpt",
        {
            "conversations": [{"from": "function_call", "value": '{"name": "look", "arguments": "3"}'}],
            "chosen": {},
            "rejected": {},
        },
        "`conversations` has a turn from 'function_call' that is no JSON object with `name` and "
        "`arguments`, nor a list of these",
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
        "`conversations` ends with a turn from 'gpt', expected what the answers reply to",
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
        "`chat_template_kwargs` is a str, expected an object",
    ),
    "no instruction": (
        "alpaca",
        {"instruction": None, "chosen": "Yes.", "rejected": "No."},
        "`instruction` is missing, expected text",
    ),
    "input that is a number": (
        "alpaca",
        {"instruction": "Well?", "input": 7, "chosen": "Yes.", "rejected": "No."},
        "`input` is a int, expected text",
    ),
}


@pytest.mark.parametrize(("data_format", "row", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_each_unusable_row_says_what_is_wrong(data_format: str, row: dict[str, Any], reason: str) -> None:
    assert parse_row(row, data_format) == RowProblem(reason)


def test_all_unusable_rows_are_told_at_once() -> None:
    rows = [TEXT] * 12
    for number in (1, 2, 4, 5, 7, 11):
        rows[number] = {**TEXT, "rejected": " "}
    for number in (0, 9):
        rows[number] = {**TEXT, "prompt": None}
    rows[8] = {**TEXT, "chosen": None, "rejected": ""}
    with pytest.raises(DataError) as caught:
        tokenize_rows(Dataset.from_list(rows), "text", make_byte_tokenizer())
    assert str(caught.value) == (
        "the data: 9 rows cannot be used (rows are counted from 0, format text):\n"
        "  `rejected` is empty: 6 rows, number 1, 2, 4, 5, 7, …\n"
        "  `prompt` is missing, expected text: 2 rows, number 0, 9\n"
        "  `chosen` is missing, expected text: 1 row, number 8\n"
        "Correct or remove them and run again."
    )


def test_a_single_unusable_row_is_told_in_the_singular() -> None:
    with pytest.raises(
        DataError,
        match=r"^the data: 1 row cannot be used \(rows are counted from 0, format text\):\n  `chosen` is empty: 1 row, number 0\n",
    ):
        tokenize_rows(Dataset.from_list([{**TEXT, "chosen": ""}]), "text", make_byte_tokenizer())


EXTRA = {"system": "Be brief.", "history": [], "tools": "[]", "chat_template_kwargs": {}}


@pytest.mark.parametrize(
    ("data_format", "row", "unused"),
    [
        ("text", TEXT, ["system", "history", "tools", "chat_template_kwargs"]),
        (
            "implicit",
            {"chosen": "a b", "rejected": "a c"},
            ["system", "history", "tools", "chat_template_kwargs"],
        ),
        (
            "implicit",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            ["system", "history"],
        ),
        (
            "ranked",
            {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
            ["system", "history", "tools", "chat_template_kwargs"],
        ),
        ("ranked", {"prompt": [user("a")], "responses": ["b", "c"], "scores": [1, 2]}, ["history"]),
        ("alpaca", {"instruction": "a", "chosen": "b", "rejected": "c"}, []),
    ],
)
def test_columns_that_the_rows_have_no_use_for_are_found(
    data_format: str, row: dict[str, Any], unused: list[str]
) -> None:
    assert unused_columns(data_format, [*row, *EXTRA], {**row, **EXTRA}) == unused
    assert unused_columns(data_format, list(row), row) == []


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(DataError) as caught:
        check_format("question", ["prompt", "chosen", "rejected"])
    assert str(caught.value) == (
        "`format` question needs the columns question, chosen, rejected; the data has no question, but "
        "prompt, chosen, rejected.\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question."
    )
