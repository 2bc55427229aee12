from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dpo_cache.data import read_dataset, take_rows, tokenize_rows, tokenized_windows
from dpo_cache.data.columns import SYSTEMS
from dpo_cache.data.examples import Example, parse_row
from dpo_cache.data.formats import FORMATS as ALL_FORMATS
from dpo_cache.data.formats import (
    RANKED,
    check_format,
    columns_read,
    detect_format,
    unused_columns,
    unused_remark,
)
from dpo_cache.data.refusals import ACCEPTED
from dpo_cache.errors import DataError
from dpo_cache.options.exchange import IMPORT_FORMATS
from dpo_cache.options.precompute import FORMATS as PRECOMPUTE_FORMATS
from dpo_cache.options.precompute import RANKED_FORMATS
from tests.data import test_compared, test_ranked, test_two_sides
from tests.data.conftest import assistant, make_byte_tokenizer, message, user, write_lines
from tests.data.test_examples import FORMATS as COMMON_FORMATS
from tests.data.test_examples import TEXT
from tests.data.test_two_sides import SHAPES

FORMATS: dict[str, tuple[str, dict[str, Any], Example]] = {
    **COMMON_FORMATS,
    **test_two_sides.SHAPES,
    **test_ranked.SHAPES,
    **{name: ("compared", row, example) for name, (row, example) in test_compared.SHAPES.items()},
}


@pytest.mark.parametrize(("data_format", "row", "_"), FORMATS.values(), ids=FORMATS)
def test_each_format_is_recognised(data_format: str, row: dict[str, Any], _: Example) -> None:
    assert detect_format(list(row), row) == data_format


@pytest.mark.parametrize(("data_format", "row", "_"), FORMATS.values(), ids=FORMATS)
def test_a_format_may_be_named(data_format: str, row: dict[str, Any], _: Example) -> None:
    assert check_format(data_format, list(row)) == data_format


def test_a_prompt_column_next_to_an_instruction_is_the_prompt() -> None:
    assert detect_format(["instruction", *TEXT], TEXT) == "text"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(["question", "answer"], "question, answer"), (["prompt", "chosen"], "prompt, chosen"), ([], "(none)")],
)
def test_other_data_is_refused_with_the_formats_that_are_accepted(columns: list[str], shown: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(columns, {})
    assert str(caught.value) == (
        f"the data is not preference data: found the columns {shown}; accepted are\n{ACCEPTED}\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question, or rename them."
    )


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
def test_columns_that_the_rows_do_not_use_are_found(
    data_format: str, row: dict[str, Any], unused: list[str]
) -> None:
    assert unused_columns(data_format, [*row, *EXTRA], {**row, **EXTRA}) == unused
    assert unused_columns(data_format, list(row), row) == []


ANSWERS = {"chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"instruction": "a", "question": "What?", **ANSWERS}, ["question"]),
        ({"prompt": "a", "query": "What?", "problem": "So?", **ANSWERS}, ["query", "problem"]),
        ({"question": "a", "user_input": "What?", **ANSWERS}, ["user_input"]),
        ({"messages": [user("So?")], "question": "What?", **ANSWERS}, ["messages"]),
        ({"messages": [user("What?")], "question": "What?", **ANSWERS}, []),
        ({"messages": None, "question": "What?", **ANSWERS}, []),
        ({"prompt": "Say: What?", "question": "What?", **ANSWERS}, []),  # a part of the prompt
        ({"prompt": "a", "question": None, **ANSWERS}, ["question"]),  # other rows may have one
        ({"prompt": [user("a")], "messages": [user("a"), assistant("b")], **ANSWERS}, []),
        ({"prompt": "a", "context": "What?", **ANSWERS}, ["context"]),
        ({"prompt": "a", "system_prompt": "Be brief.", **ANSWERS}, ["system_prompt"]),
        ({"question": "a", "system_prompt": "Be brief.", **ANSWERS}, []),
        (
            {"question": "a", "system": "Be kind.", "system_message": "Be brief.", **ANSWERS},
            ["system_message"],
        ),
        ({"context": [user("a")], "response_a": "b", "response_b": "c", "winner": "a"}, []),
        ({"context": [user("a")], "completions": [{"text": "b", "rank": 1}, {"text": "c", "rank": 2}]}, []),
        (
            {"instruction": "a", "context": "What?", "response_a": "b", "response_b": "c", "winner": "a"},
            ["context"],
        ),
    ],
)
def test_prompts_and_system_messages_that_are_not_read_are_found(
    row: dict[str, Any], unused: list[str]
) -> None:
    assert unused_columns(detect_format(list(row), row), list(row), row) == unused


@pytest.mark.parametrize(
    ("columns", "remark"),
    [
        (["system"], "the column system is not used by the format text."),
        (["system", "history"], "the columns system, history are not used by the format text."),
        (
            ["system", "query"],
            "the columns system, query are not used by the format text. If query is the prompt, name it with "
            "`map`: `map` prompt=query.",
        ),
    ],
)
def test_a_remark_on_columns_that_are_not_used(columns: list[str], remark: str) -> None:
    assert unused_remark(columns, "text") == remark


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("prompt", [{"question": "a"}, {"instruction": "a"}, {"prompt": [user("a")]},
                                    {"messages": [user("a")]}, {"conversations": [user("a")]}])  # fmt: skip
def test_a_system_message_under_another_name(prompt: dict[str, Any], name: str) -> None:
    row = {**prompt, **ANSWERS}
    data_format = detect_format(list(row), row)
    clean = parse_row({**row, "system": "Be brief."}, data_format)
    assert isinstance(clean, Example) and clean.prompt[0] == message("system", "Be brief.")
    assert parse_row({**row, name: "Be brief."}, data_format) == clean
    assert parse_row({**row, "system": "Be brief.", name: "Be kind."}, data_format) == clean
    assert parse_row({**row, "system": "", name: "Be brief."}, data_format) == clean
    assert parse_row({**row, name: None}, data_format) == parse_row(row, data_format)


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(DataError) as caught:
        check_format("question", ["prompt", "chosen", "rejected"])
    assert str(caught.value) == (
        "`format` question needs the columns question, chosen, rejected; the data has no question, but "
        "prompt, chosen, rejected.\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question."
    )


def test_the_options_name_every_format() -> None:
    assert sorted(PRECOMPUTE_FORMATS) == sorted(["auto", *ALL_FORMATS])
    assert set(IMPORT_FORMATS) == {"auto", *ALL_FORMATS, "ids"} - {*RANKED}
    assert RANKED == RANKED_FORMATS
    assert {data_format for data_format, _, _ in FORMATS.values()} == set(ALL_FORMATS)


@pytest.mark.parametrize(
    ("data_format", "columns", "read_as"),
    [
        ("text", ["prompt", "chosen", "rejected"], None),
        ("ranked", ["prompt", "responses", "scores"], None),
        (
            "question",
            ["question", "response_j", "response_k"],
            "`response_j` is read as chosen, `response_k` as rejected",
        ),
        (
            "compared",
            ["prompt", "response_0", "response_1", "better_response_id", "safer_response_id", "preference"],
            "the better of `response_0` and `response_1` is chosen, by `preference`",
        ),
        ("implicit", ["chosen", "rejected", "id"], None),
        (
            "implicit",
            ["task", "chosen", "rejected"],
            "the prompt is the text that the answers share. If it is in task, name it with `map`, for example `map` "
            "prompt=task",
        ),
        (
            "compared",
            ["question", "answer_0", "answer_1", "score_0", "score_1"],
            "the better of `answer_0` and `answer_1` is chosen, by `score_0` and `score_1`",
        ),
    ],
)
def test_names_that_do_not_tell_what_is_chosen_are_explained(
    data_format: str, columns: list[str], read_as: str | None
) -> None:
    row = {name: value for name, value in ROWS_OF_TYPES.items() if name in columns}
    assert detect_format(columns, row) == data_format
    assert columns_read(data_format, columns, row) == read_as


ROWS_OF_TYPES = {"responses": [" a", " b"], "chosen": "a", "rejected": "b", "task": "Well?", "id": 7}

REFUSED = {
    "KTO": (
        {"prompt": "a", "completion": "b", "label": True},
        "the data is not paired: a row has one answer (`completion`) and a judgement of it (`label`), as for KTO. DPO "
        "compares two answers to one prompt.\n"
        "Put two answers into a row, as `chosen` and `rejected`, or more, as lists `responses` and `scores`.",
    ),
    "KTO as messages": (
        {"messages": [user("a"), assistant("b")], "label": False},
        "the data is not paired: a row has one answer (`messages`) and a judgement of it (`label`), as for KTO. DPO "
        "compares two answers to one prompt.\n"
        "Put two answers into a row, as `chosen` and `rejected`, or more, as lists `responses` and `scores`.",
    ),
    "two answers without a verdict": (
        {"prompt": "a", "response_a": "b", "response_b": "c", "label": 1},
        "the data: no column tells which of `response_a` and `response_b` is better: name one that holds a or b with "
        "`map`, for example `map` preference=choice.\n"
        "It has the columns prompt, response_a, response_b, label.",
    ),
    "three answers": (
        {"prompt": "a", "response_0": "b", "response_1": "c", "response_2": "d", "better_response_id": 1},
        "the data: its answers are in 3 columns (response_0, response_1, response_2), expected two.\n"
        "Put them into a list `responses`, with a list `scores` or `ranks`.",
    ),
    "answers without ranks": (
        {"question": "a", "answers": ["b", "c"]},
        "the data: nothing ranks the answers in `answers`, expected a list `scores` or `ranks`, or answers that are "
        "objects with a score or rank.\n"
        "It has the columns question, answers. Name one with `map`, for example `map` scores=ratings.",
    ),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_data_that_holds_no_preferences_is_refused_with_its_reason(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(list(row), row)
    assert str(caught.value) == message


@pytest.mark.parametrize("row", [{"instruction": "a", "input": "", "output": "b"}, {"messages": [user("a")]}])
def test_rows_of_one_answer_are_no_preference_data(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the data is not preference data: found the columns"):
        detect_format(list(row), row)


def test_messages_in_text_are_recognised() -> None:
    row = {"prompt": "a", "chosen": '[{"role": "assistant", "content": "b"}]', "rejected": "c"}
    assert detect_format(list(row), row) == "conversation"


@pytest.mark.parametrize(("data_format", "row", "example"), FORMATS.values(), ids=FORMATS)
def test_rows_as_arrow_gives_them_are_the_same(
    data_format: str, row: dict[str, Any], example: Example
) -> None:
    (made,) = pa.Table.from_pylist([row]).to_pylist()
    assert detect_format(list(made), made) == data_format
    assert parse_row(made, data_format) == example


# A shape of each kind, as it is odd, and the rows of its pairs in the formats that TRL reads
CHAT = {"prompt": [user("Well?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]}
LATER = {**CHAT, "prompt": [user("Hi."), assistant("Hi!"), user("Well?")]}
ODD: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sharegpt with text": (SHAPES["sharegpt with answers as text (MedicalGPT)"][1], [CHAT]),
    "swift": (SHAPES["messages and rejected_messages (ms-swift)"][1], [LATER]),
    "output": (SHAPES["output with two answers (older LLaMA-Factory)"][1], [CHAT]),
    "NeMo": (test_ranked.SHAPES["context and completions (NeMo)"][1], [CHAT]),
    "UltraFeedback": (test_ranked.SHAPES["UltraFeedback"][1], [CHAT]),
    "two answers": (test_compared.SHAPES["HelpSteer 3"][0], [CHAT]),
    "several rejected answers": (
        SHAPES["messages with several rejected answers"][1],
        [CHAT, {**CHAT, "rejected": [assistant("Eh.")]}],
    ),
    "several rejected texts": (
        SHAPES["text with several rejected answers"][1],
        [{"prompt": "Well?", "chosen": " Yes.", "rejected": text} for text in (" No.", " Eh.")],
    ),
}
IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.mark.parametrize("source", ["rows.jsonl", "rows.parquet", "stream", "memory"])
@pytest.mark.parametrize("shape", ODD)
def test_ids_of_a_shape_are_those_of_its_clean_form(shape: str, source: str, tmp_path: Path) -> None:
    odd, clean = ODD[shape]
    path = tmp_path / ("rows.jsonl" if source == "stream" else source)
    if source == "rows.parquet":
        pq.write_table(pa.Table.from_pylist([odd, odd]), path)
    elif source != "memory":
        write_lines(path, [odd, odd])
    given = (
        take_rows([odd, odd]) if source == "memory" else read_dataset(str(path), streaming=source == "stream")
    )
    tokenizer = make_byte_tokenizer()
    windows = tokenized_windows(
        given["train"], detect_format(list(odd), odd), tokenizer, window_rows=4, spool=tmp_path, place="rows"
    )
    found = [{name: made[name] for name in IDS} for window in windows for made in window]
    kind = "text" if isinstance(clean[0]["prompt"], str) else "conversation"
    wanted = tokenize_rows(Dataset.from_list(clean), kind, tokenizer).select_columns(IDS).to_list()
    assert found == wanted * 2


def test_a_row_of_another_shape_is_named(tmp_path: Path) -> None:
    rows = [TEXT, {"question": "Well?", "chosen": "Yes.", "rejected": "No."}, TEXT]
    read = read_dataset(write_lines(tmp_path / "rows.jsonl", rows))["train"]
    with pytest.raises(DataError, match="`prompt` is missing, expected text: 1 row, "):
        tokenize_rows(read, "text", make_byte_tokenizer())
