"""Each odd form of a message, row or file gives the ids of its clean form."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import detect_format, first_row, read_dataset, take_rows, tokenize_rows, tokenized_windows
from dpo_cache.data.examples import RowProblem, parse_row
from dpo_cache.data.tool_calls import ARGUMENTS_AS_TEXT
from dpo_cache.data.unions import KEPT, LEFT_OUT
from tests.data.conftest import assistant, make_byte_tokenizer, message, user, write_lines

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}"
    "{{ ' ' + message['name'] if message['name'] else '' }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] }} {{ call['function']['arguments'] | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def ids_of(rows: Any, tokenizer: PreTrainedTokenizerFast, spool: Path | None = None) -> list[Any]:
    """Ids and notes of each row; in windows of two rows if there is a folder to keep them in."""
    (found,) = (rows if isinstance(rows, dict) else take_rows(rows)).values()
    first = first_row(found, "the data")
    data_format = detect_format(list(found.column_names or first), first)
    tables = (
        [tokenize_rows(found, data_format, tokenizer)]
        if spool is None
        else tokenized_windows(found, data_format, tokenizer, window_rows=2, spool=spool, place="the data")
    )
    return [
        ((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]), row["notes"])
        for table in tables
        for row in table.to_list()
    ]


def texts_of(found: list[Any], tokenizer: PreTrainedTokenizerFast) -> list[list[str]]:
    return [[tokenizer.decode(ids) for ids in row] for row, _ in found]


def calling(name: str, arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
        **fields,
    }


ARGUMENTS = {"city": "Öslo", "days": [1, None]}
CLEAN = {
    "prompt": [
        message("system", "Be brief."),
        user("Well?"),
        calling("look", ARGUMENTS),
        message("tool", "blue"),
    ],
    "chosen": [assistant("Yes.")],
    "rejected": [calling("look", ARGUMENTS)],
}


def changed(**sides: Any) -> dict[str, Any]:
    """The clean row with other messages in place of these."""
    row = {name: list(messages) for name, messages in CLEAN.items()}
    for name, value in sides.items():
        if name in ("system", "asked", "called", "result"):
            row["prompt"][("system", "asked", "called", "result").index(name)] = value
        else:
            row[name] = value
    return row


TEXT_CALL = {"name": "look", "arguments": json.dumps(ARGUMENTS)}
ODD: dict[str, dict[str, Any]] = {
    "case of roles": changed(asked=message("User", "Well?"), chosen=[message("ASSISTANT", "Yes.")]),
    "human and gpt": changed(asked=message("human", "Well?"), chosen=[message("gpt", "Yes.")]),
    "bot and observation": changed(result=message("observation", "blue"), chosen=[message("bot", "Yes.")]),
    "from and value": changed(asked={"from": "human", "value": "Well?"}, chosen=[{"from": "gpt", "value": "Yes."}]),
    "role and value": changed(asked={"role": "user", "value": "Well?"}),
    "null next to the other name": changed(asked={**user("Well?"), "from": None, "value": None, "name": None}),
    "parts": changed(
        asked={"role": "user", "content": [{"type": "text", "text": "We"}, {"type": "text", "text": "ll?"}]},
        chosen=[{"role": "assistant", "content": [{"type": "text", "value": "Yes."}]}],
    ),
    "parts of several kinds": changed(
        asked={"role": "user", "content": ["W", {"text": "e"}, {"type": "input_text", "text": "ll?"}]},
        system={"role": "system", "content": {"type": "text", "text": "Be brief."}},
    ),
    "parts with nulls": changed(
        asked={"role": "user", "content": [{"type": "text", "text": "Well?", "image_url": None}]}
    ),
    "arguments as JSON": changed(
        called=calling("look", json.dumps(ARGUMENTS)), rejected=[calling("look", json.dumps(ARGUMENTS))]
    ),
    "bare calls": changed(called={"role": "assistant", "content": None, "tool_calls": [TEXT_CALL]}),
    "calls as JSON": changed(called={**assistant(""), "tool_calls": json.dumps([TEXT_CALL])}),
    "function_call": changed(
        called={"role": "assistant", "content": None, "function_call": TEXT_CALL},
        rejected=[{"role": "assistant", "function_call": TEXT_CALL}],
    ),
    "role function_call": changed(
        called=message("function_call", json.dumps(TEXT_CALL)),
        rejected=[{"from": "function_call", "value": json.dumps([TEXT_CALL])}],
    ),
    "no calls": changed(chosen=[{**assistant("Yes."), "tool_calls": []}]),
    "one message": changed(chosen=assistant("Yes."), rejected=calling("look", ARGUMENTS)),
    "an object around messages": changed(prompt={"messages": CLEAN["prompt"]}),
    "objects of lists": changed(chosen={"role": ["assistant"], "content": ["Yes."]}),
    "prompt as JSON": changed(prompt=json.dumps(CLEAN["prompt"])),
    "prompt as JSON of an object": changed(prompt=json.dumps({"messages": CLEAN["prompt"], "id": 3})),
    "prompt as Python": changed(prompt=str(CLEAN["prompt"])),
    "all as JSON": {name: json.dumps(value) for name, value in CLEAN.items()},
    "all as Python": {name: str(value) for name, value in CLEAN.items()},
    "whole dialogues": changed(
        chosen=json.dumps(CLEAN["prompt"] + CLEAN["chosen"]), rejected=json.dumps(CLEAN["prompt"] + CLEAN["rejected"])
    ),
    "implicit": {side: json.dumps(CLEAN["prompt"] + CLEAN[side]) for side in ("chosen", "rejected")},
    "sharegpt": {
        "conversations": json.dumps(
            [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Well?"},
                {"from": "function_call", "value": json.dumps(TEXT_CALL)},
                {"from": "observation", "value": "blue"},
            ]
        ),
        "chosen": json.dumps({"from": "gpt", "value": "Yes."}),
        "rejected": json.dumps({"from": "function_call", "value": json.dumps(TEXT_CALL)}),
    },
    "sharegpt around messages": {
        "conversations": json.dumps({"messages": CLEAN["prompt"]}),
        "chosen": CLEAN["chosen"],
        "rejected": CLEAN["rejected"],
    },
    "messages as a question": {
        "question": json.dumps(CLEAN["prompt"]),
        "chosen": CLEAN["chosen"],
        "rejected": json.dumps(CLEAN["rejected"]),
    },
    "messages as a query, with the chosen answer": {
        "query": [*CLEAN["prompt"], *CLEAN["chosen"]],
        "chosen": CLEAN["chosen"],
        "rejected": CLEAN["rejected"],
    },
    "messages as an instruction, a system message": {
        "system": "Be brief.",
        "instruction": CLEAN["prompt"][1:],
        "input": "",
        "chosen": CLEAN["chosen"],
        "rejected": CLEAN["rejected"],
    },
    "sharegpt with messages": {"conversations": CLEAN["prompt"], "chosen": CLEAN["chosen"], "rejected": CLEAN["rejected"]},
    "ranked": {"prompt": CLEAN["prompt"], "responses": [CLEAN["rejected"], CLEAN["chosen"]], "scores": [1, 2]},
    "ranked as JSON": {
        "prompt": json.dumps(CLEAN["prompt"]),
        "responses": json.dumps([CLEAN["rejected"], CLEAN["chosen"]]),
        "scores": "[1, 2]",
    },
    "ranked, each as JSON": {
        "prompt": json.dumps(CLEAN["prompt"]),
        "responses": [json.dumps(CLEAN["rejected"]), json.dumps(CLEAN["chosen"])],
        "scores": [1, 2],
    },
}  # fmt: skip


@pytest.mark.parametrize("row", ODD.values(), ids=ODD)
def test_an_odd_row_has_the_ids_of_its_clean_form(row: Any, tokenizer: Any, tmp_path: Path) -> None:
    expected = ids_of([CLEAN], tokenizer)
    assert ids_of([row], tokenizer) == expected
    place = write_lines(tmp_path / "rows.jsonl", [row] * 3)
    assert ids_of(read_dataset(place), tokenizer) == expected * 3
    assert ids_of(read_dataset(place, streaming=True), tokenizer, tmp_path / "spool") == expected * 3


def test_the_ids_of_the_clean_form_are_those_of_the_template(tokenizer: Any) -> None:
    assert texts_of(ids_of([CLEAN], tokenizer), tokenizer) == [
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWell?<|im_end|>\n"
            '<|im_start|>assistant\nlook {"city": "Öslo", "days": [1, null]}<|im_end|>\n'
            "<|im_start|>tool\nblue<|im_end|>\n<|im_start|>assistant\n",
            "Yes.<|im_end|>\n",
            'look {"city": "Öslo", "days": [1, null]}<|im_end|>\n',
        ]
    ]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("look", city={"type": "string"}), tool("pay", amount={"type": "number"}, to={"type": "string"})]
UNION = [  # three rows, so that windows of two rows have other unions than the whole
    {
        "prompt": [user("a")],
        "chosen": [calling("look", {"city": "Oslo"})],
        "rejected": [calling("look", {"city": "Bergen"})],
        "tools": TOOLS,
    },
    {
        "prompt": [user("a"), calling("pay", {"amount": 5.5}), message("tool", "done")],
        "chosen": [calling("pay", {"amount": 1.5, "to": "Bo"})],
        "rejected": [calling("wait", {})],
        "tools": [*TOOLS[1:], tool("wait")],
    },
    {"prompt": [user("a")], "chosen": [assistant("c")], "rejected": [assistant("b")], "tools": []},
]


def write_table(rows: list[Any], place: Path) -> str:
    pq.write_table(pa.Table.from_pylist(rows), place)
    return str(place)


def test_nulls_of_arrow_reach_no_template(tokenizer: Any, tmp_path: Path) -> None:
    """Tools and calls with other keys in each row, as the tools' schemas tell."""
    expected = ids_of(read_dataset(write_lines(tmp_path / "rows.jsonl", UNION)), tokenizer)
    assert "null" not in str(texts_of(expected, tokenizer)) and not any(notes for _, notes in expected)
    assert ids_of(pa.Table.from_pylist(UNION), tokenizer) == expected
    assert ids_of(pd.DataFrame(UNION), tokenizer) == expected
    place = write_table(UNION, tmp_path / "rows.parquet")
    assert ids_of(read_dataset(place), tokenizer) == expected
    assert ids_of(read_dataset(place, streaming=True), tokenizer, tmp_path / "spool") == expected
    pd.read_parquet(place).to_parquet(tmp_path / "again.parquet")  # arrays in place of lists
    assert ids_of(read_dataset(str(tmp_path / "again.parquet")), tokenizer) == expected
    assert ids_of(pd.read_parquet(place), tokenizer) == expected


def test_nulls_that_may_be_a_row_s_own_are_noted(tokenizer: Any, tmp_path: Path) -> None:
    """Without tools, nothing tells what a call may have had."""
    rows = [{name: value for name, value in row.items() if name != "tools"} for row in UNION]
    clean = ids_of(read_dataset(write_lines(tmp_path / "rows.jsonl", rows)), tokenizer)
    found = ids_of(read_dataset(write_table(rows, tmp_path / "rows.parquet")), tokenizer)
    assert [ids for ids, _ in found] == [ids for ids, _ in clean]
    assert [notes for _, notes in found] == [[LEFT_OUT], [LEFT_OUT], []]
    assert [notes for _, notes in clean] == [[], [], []]


def test_nulls_of_json_rows_reach_the_template(tokenizer: Any, tmp_path: Path) -> None:
    tools = [
        [tool("look", city={"default": None, "enum": ["Oslo", None]})],
        [tool("pay", amount={"default": 3})],
    ]
    chosen = [calling("look", {"city": None}), calling("pay", {"amount": None, "to": {"a": None}})]
    rows = [
        {"prompt": [user("a")], "chosen": [call], "rejected": [assistant("b")], "tools": each}
        for call, each in zip(chosen, tools, strict=True)
    ]
    found = ids_of(rows, tokenizer)
    texts = texts_of(found, tokenizer)
    assert json.dumps(tools[0]) in texts[0][0] and 'look {"city": null}' in texts[0][1]
    assert json.dumps(tools[1]) in texts[1][0] and 'pay {"amount": null, "to": {"a": null}}' in texts[1][1]
    place = write_lines(tmp_path / "rows.jsonl", rows)
    assert ids_of(read_dataset(place), tokenizer) == found
    assert ids_of(read_dataset(place, streaming=True), tokenizer, tmp_path / "spool") == found
    as_text = [
        {**row, "tools": json.dumps(row["tools"]), "chosen": json.dumps(row["chosen"])} for row in rows
    ]
    for name in ("prompt", "rejected"):
        as_text = [{**row, name: json.dumps(row[name])} for row in as_text]
    assert ids_of(read_dataset(write_table(as_text, tmp_path / "text.parquet")), tokenizer) == found


def test_the_same_null_in_every_row_is_kept_and_noted(tokenizer: Any, tmp_path: Path) -> None:
    tools = [tool("look", city={"type": "string", "default": None})]
    rows = [{**UNION[2], "tools": tools}] * 3
    clean = ids_of(rows, tokenizer)
    place = write_table(rows, tmp_path / "rows.parquet")
    for found in (
        ids_of(read_dataset(place), tokenizer),
        ids_of(read_dataset(place, streaming=True), tokenizer, tmp_path / "spool"),
    ):
        assert [ids for ids, _ in found] == [ids for ids, _ in clean]
        assert [notes for _, notes in found] == [[KEPT]] * 3


def test_messages_in_csv_as_pandas_writes_them(tokenizer: Any, tmp_path: Path) -> None:
    rows = [CLEAN, {**CLEAN, "chosen": [assistant('It\'s "so",\n\\yes.')]}]
    expected = ids_of(rows, tokenizer)
    place = tmp_path / "rows.csv"
    pd.DataFrame(rows).to_csv(place, index=False)
    assert ids_of(read_dataset(str(place)), tokenizer) == expected
    assert ids_of(read_dataset(str(place), streaming=True), tokenizer, tmp_path / "spool") == expected


@pytest.mark.parametrize(
    "answer",
    ['{"action": "REFUSE"}', "[1, 2]", '[{"role": "x"}]', "007", "null", '{"from": "Oslo", "to": "x"}'],
)
@pytest.mark.parametrize("prompt", ["Well?", [user("Well?")]], ids=["text", "messages"])
def test_an_answer_that_is_json_stays_text(answer: str, prompt: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "chosen": answer, "rejected": "No."}] * 2
    found = ids_of(read_dataset(write_lines(tmp_path / "rows.jsonl", rows)), tokenizer)
    ending = "<|im_end|>" if isinstance(prompt, str) else "<|im_end|>\n"
    assert [texts[1] for texts in texts_of(found, tokenizer)] == [answer + ending] * 2
    assert [notes for _, notes in found] == [[], []]


def test_tools_have_one_form(tokenizer: Any) -> None:
    schema = TOOLS[0]["function"]["parameters"]
    as_text = {"type": "function", "function": {"name": "look", "parameters": json.dumps(schema)}}
    clean = {**UNION[2], "tools": TOOLS[:1]}
    for tools in (json.dumps(TOOLS[:1]), str(TOOLS[:1]), [json.dumps(TOOLS[0])], [as_text], TOOLS[0]):
        assert ids_of([{**clean, "tools": tools}], tokenizer) == ids_of([clean], tokenizer)
    legacy = {**UNION[2], "functions": [TOOLS[0]["function"]], "tools": None}
    assert ids_of([legacy], tokenizer) == ids_of([clean], tokenizer)
    within = {
        **UNION[2],
        "prompt": json.dumps({"messages": clean["prompt"], "tools": TOOLS[:1]}),
        "tools": None,
    }
    assert ids_of([within], tokenizer) == ids_of([clean], tokenizer)


def test_arguments_that_are_no_json_are_noted() -> None:
    example = parse_row({**CLEAN, "rejected": [calling("look", '{"city": ')]}, "conversation")
    assert not isinstance(example, RowProblem)
    assert example.notes == (ARGUMENTS_AS_TEXT,)
    assert example.answers[1][0]["tool_calls"][0]["function"]["arguments"] == '{"city": '


def test_a_developer_and_a_name_reach_the_template(tokenizer: Any) -> None:
    row = {
        **CLEAN,
        "prompt": [message("developer", "Be brief."), {**message("human", "Well?"), "name": "Bo"}],
    }
    (texts,) = texts_of(ids_of([row], tokenizer), tokenizer)
    assert texts[0].startswith(
        "<|im_start|>developer\nBe brief.<|im_end|>\n<|im_start|>user Bo\nWell?<|im_end|>"
    )


def test_the_result_of_a_tool_may_be_an_object() -> None:
    row = changed(result={"role": "tool", "content": {"sky": "blue", "é": [1, None]}})
    example = parse_row(row, "conversation")
    assert not isinstance(example, RowProblem)
    assert example.prompt[3] == message("tool", '{"sky": "blue", "é": [1, null]}')


RESULTS: dict[str, tuple[Any, str]] = {
    "an object with text": ({"text": "blue", "score": 1}, '{"text": "blue", "score": 1}'),
    "objects with text": ([{"text": "blue", "url": "b"}], '[{"text": "blue", "url": "b"}]'),
    "an object with an image": ({"image": "nginx", "up": True}, '{"image": "nginx", "up": true}'),
    "a part and an object": (
        [{"type": "text", "text": "a"}, {"text": "b", "at": 1}],
        '[{"type": "text", "text": "a"}, {"text": "b", "at": 1}]',
    ),
    "a part with another member": (
        {"type": "text", "text": "a", "url": "b"},
        '{"type": "text", "text": "a", "url": "b"}',
    ),
    "only text": ({"text": "blue"}, "blue"),
    "only text and a null": ([{"text": "blue", "url": None}], "blue"),
    "parts": ([{"type": "text", "text": "bl", "cache_control": {"type": "ephemeral"}}, "ue"], "blue"),
    "empty": ("", ""),
    "no parts": ([], ""),
}


@pytest.mark.parametrize(("content", "text"), RESULTS.values(), ids=RESULTS)
@pytest.mark.parametrize("role", ["tool", "observation"])
def test_the_text_of_a_result(role: str, content: Any, text: str) -> None:
    example = parse_row(changed(result={"role": role, "content": content}), "conversation")
    assert not isinstance(example, RowProblem)
    assert example.prompt[3] == message("tool", text)


PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Well?"}]
PROBLEMS: dict[str, tuple[Any, str]] = {
    "a number": (message("user", 5), "`prompt` has a message whose `content` is a number, expected text"),  # type: ignore[arg-type]
    "a value that is a number": (
        {"from": "human", "value": 5},
        "`prompt` has a message whose `value` is a number, expected text",
    ),
    "null": (message("user", None), "`prompt` has a message whose `content` is missing, expected text"),  # type: ignore[arg-type]
    "NaN": (
        message("user", float("nan")),  # type: ignore[arg-type]
        "`prompt` has a message whose `content` is missing, expected text",
    ),
    "only an image": (
        {"role": "user", "content": PARTS[:1]},
        "`prompt` has a message whose `content` has no text, and only text is scored",
    ),
    "an unknown part": (
        {"role": "user", "content": [{"type": "poem", "poem": "x"}]},
        "`prompt` has a message whose `content` has a part of the type 'poem', expected text",
    ),
    "a part that is a number": (
        {"role": "user", "content": [5]},
        "`prompt` has a message whose `content` has a part of the form number, expected text",
    ),
    "no text in parts": (
        {"role": "user", "content": [{"type": "text", "text": " "}]},
        "`prompt` has a message whose `content` is empty",
    ),
    "text with other members": (
        {"role": "user", "content": {"text": "Well?", "context": "The sky."}},
        "`prompt` has a message whose `content` has text in an object with `context`, expected text",
    ),
    "a part with other members": (
        {"role": "user", "content": [{"type": "text", "text": "Well?", "url": "a"}]},
        "`prompt` has a message whose `content` has text in an object with `url`, expected text",
    ),
    "no role": ({"content": "Well?"}, "`prompt` has a message without `role`"),
    "a role that is a number": ({"role": 3, "content": "Well?"}, "`prompt` has a message without `role`"),
}


@pytest.mark.parametrize(("entry", "reason"), PROBLEMS.values(), ids=PROBLEMS)
def test_other_messages_are_refused(entry: Any, reason: str) -> None:
    assert parse_row({**CLEAN, "prompt": [entry]}, "conversation") == RowProblem(reason)


def test_messages_as_a_question_come_after_the_history() -> None:
    row = {"question": [message("system", "Be brief."), user("Well?")], "history": [["a", "b"]]}
    example = parse_row({**row, "chosen": "Yes.", "rejected": "No."}, "question")
    assert not isinstance(example, RowProblem)
    assert example.prompt == [message("system", "Be brief."), user("a"), assistant("b"), user("Well?")]
    both = {"instruction": [user("Well?")], "input": "x", "chosen": "Yes.", "rejected": "No."}
    assert parse_row(both, "alpaca") == RowProblem(
        "`input` is next to messages in `instruction`, expected text in `instruction`"
    )


def test_messages_that_are_text_are_named() -> None:
    row = {"messages": "<|im_start|>user\nWell?", "chosen": "Yes.", "rejected": "No."}
    assert parse_row(row, "implicit") == RowProblem(
        "`messages` is text, not messages as JSON, and the answers have no common start as their prompt"
    )


@pytest.mark.parametrize("role_key", ["role", "from"])
@pytest.mark.parametrize("data_format", ["conversation", "implicit", "sharegpt", "ranked"])
def test_unknown_roles_are_refused_in_every_format(data_format: str, role_key: str) -> None:
    stranger = {role_key: "critic", "content" if role_key == "role" else "value": "Hm."}
    row: dict[str, Any] = {
        "conversation": {**CLEAN, "prompt": [stranger]},
        "implicit": {side: [user("a"), stranger, *CLEAN[side]] for side in ("chosen", "rejected")},
        "sharegpt": {"conversations": [stranger], "chosen": CLEAN["chosen"], "rejected": CLEAN["rejected"]},
        "ranked": {"prompt": "a", "responses": [[stranger], [assistant("b")]], "scores": [1, 2]},
    }[data_format]
    for odd in (row, {name: json.dumps(value) for name, value in row.items()}):
        problem = parse_row(odd, data_format)
        assert isinstance(problem, RowProblem)
        assert " has a turn from 'critic', expected one of user, human, " in problem.reason


def test_media_are_left_out_and_noted(tokenizer: Any) -> None:
    clean = {**CLEAN, "prompt": [user("Well?")]}
    ((ids, _),) = ids_of([clean], tokenizer)
    for prompt in ([{"role": "user", "content": PARTS}], json.dumps([{"role": "user", "content": PARTS}])):
        ((found, notes),) = ids_of([{**clean, "prompt": prompt}], tokenizer)
        assert found == ids
        assert notes == ["its images are left out, because only text is scored"]


def test_a_stream_of_dicts_has_the_ids_of_the_list(tokenizer: Any, tmp_path: Path) -> None:
    """Its rows have no types, and values that make no table."""
    rows = [{**CLEAN, "rejected": [calling("look", {"city": city})]} for city in ("Oslo", None, 5)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    found = ids_of(stream, tokenizer, tmp_path / "spool")
    assert found == ids_of(rows, tokenizer)
    assert [texts[2] for texts in texts_of(found, tokenizer)] == [
        f'look {{"city": {city}}}<|im_end|>\n' for city in ('"Oslo"', "null", "5")
    ]


LOOK, PAY = calling("look", {"city": "Oslo"}), calling("pay", {"amount": 1.5, "to": "Bo"})
SHAREGPT = {"chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}}
IN_EVERY_FORMAT: dict[str, list[dict[str, Any]]] = {
    "implicit": [
        {"chosen": [user("a"), LOOK], "rejected": [user("a"), assistant("b")]},
        {"chosen": [user("a"), PAY], "rejected": [user("a"), LOOK]},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "a"}], **SHAREGPT},
        {"conversations": [{"from": "human", "value": "d"}], **SHAREGPT},
    ],
    "alpaca": [{"instruction": text, "input": "", "chosen": "b", "rejected": "c"} for text in "ad"],
    "question": [{"question": text, "chosen": "b", "rejected": "c"} for text in "ad"],
    "ranked": [
        {"prompt": [user("a")], "responses": [[LOOK], [assistant("b")]], "scores": [1.5, 2]},
        {"prompt": [user("a")], "responses": [[PAY], [LOOK]], "scores": [1.5, 2]},
    ],
    "messages": [
        {"messages": [user("a"), LOOK, message("tool", "b")], "chosen": "b", "rejected": "c"},
        {"messages": [user("a"), PAY, message("tool", "b")], "chosen": "b", "rejected": "c"},
    ],
}


@pytest.mark.parametrize("data_format", IN_EVERY_FORMAT)
def test_nulls_of_arrow_reach_no_template_in_any_format(
    data_format: str, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {**row, "tools": tools}
        for row, tools in zip(IN_EVERY_FORMAT[data_format], (TOOLS, TOOLS[::-1]), strict=True)
    ]
    rows[0]["tools"] = [tool("look", city={"type": "string"}, day={"enum": ["Monday"]}), TOOLS[1]]
    expected = ids_of(read_dataset(write_lines(tmp_path / "rows.jsonl", rows)), tokenizer)
    place = write_table(rows, tmp_path / "rows.parquet")
    assert ids_of(read_dataset(place), tokenizer) == expected
    assert ids_of(read_dataset(place, streaming=True), tokenizer, tmp_path / "spool") == expected
    assert ids_of(Dataset.from_parquet(place, cache_dir=str(tmp_path)).to_list(), tokenizer) == expected
    assert not any(notes for _, notes in expected)
    assert "null" not in str(texts_of(expected, tokenizer))
