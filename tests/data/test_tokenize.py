from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import load_tokenizer, read_dataset, tokenize_rows
from dpo_cache.errors import DataError, ModelError
from tests.data.conftest import assistant, make_byte_tokenizer, message, user, write_lines

KINDS = ["bytes", "byte-level BPE", "prefix space"]
EOS = "<|im_end|>"

TEXT_ROWS = [
    {"prompt": "what is the answer?", "chosen": " the cat", "rejected": " the dog"},
    {"prompt": "the", "chosen": "re is the cat", "rejected": "mat"},
    {"prompt": "the ", "chosen": "cat", "rejected": " cat"},
    {"prompt": " the cat\n", "chosen": "\n\nsat", "rejected": "sat  "},
    {"prompt": "é🙂", "chosen": "🙂é", "rejected": "e"},
    {"prompt": "x", "chosen": "y", "rejected": f"y{EOS}"},
    {"prompt": "the dog", "chosen": f"s{EOS}", "rejected": f"s{EOS}{EOS}"},
    {"prompt": f"the{EOS}", "chosen": "the", "rejected": "the the"},
]
CHAT_ROWS = [
    {
        "prompt": [user("what is the answer?")],
        "chosen": [assistant("the cat")],
        "rejected": [assistant("the dog")],
    },
    {
        "prompt": [message("system", ""), user("the")],
        "chosen": [assistant("x")],
        "rejected": [assistant(" x ")],
    },
    {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [assistant("d"), user("e"), assistant("f")],
        "rejected": [assistant("d")],
    },
    {"prompt": [user("é🙂\n\n")], "chosen": [assistant("\n🙂")], "rejected": [assistant(f"{EOS}é")]},
]

MERGED_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)


def texts_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Prompt, prompt + chosen, prompt + rejected: as text, or through the template one conversation at a
    time.
    """
    if isinstance(row["prompt"], str):
        return [
            row["prompt"],
            *(
                row["prompt"] + row[side] + ("" if row[side].endswith(EOS) else EOS)
                for side in ("chosen", "rejected")
            ),
        ]
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    return [
        prompt,
        *(
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            for side in ("chosen", "rejected")
        ),
    ]


def naive_row(number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The definition, one text at a time: the answers begin where the ids of prompt and prompt + answer
    part.
    """
    is_text = isinstance(row["prompt"], str)
    prompt, chosen, rejected = (
        tokenizer.encode(text, add_special_tokens=is_text) for text in texts_of(row, tokenizer)
    )
    cut = 0
    while cut < len(prompt) and chosen[cut : cut + 1] == rejected[cut : cut + 1] == prompt[cut : cut + 1]:
        cut += 1
    return {
        "row": number,
        "prompt_ids": prompt[:cut],
        "chosen_ids": chosen[cut:],
        "rejected_ids": rejected[cut:],
        "moved_boundary": cut < len(prompt),
        "dropped": None,
        "problem": None,
    }


def tokenize(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    data_format = "text" if isinstance(rows[0]["prompt"], str) else "conversation"
    return without_notes(tokenize_rows(Dataset.from_list(rows), data_format, tokenizer))


def without_notes(tokenized: Dataset) -> list[dict[str, Any]]:
    return tokenized.remove_columns("notes").to_list()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS], ids=["text", "conversation"])
def test_ids_are_those_of_the_naive_definition(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, rows: list[dict[str, Any]]
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenize(rows, tokenizer) == [naive_row(number, row, tokenizer) for number, row in enumerate(rows)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [TEXT_ROWS, CHAT_ROWS], ids=["text", "conversation"])
def test_no_token_is_lost_at_the_boundary(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, rows: list[dict[str, Any]]
) -> None:
    tokenizer = tokenizers[kind]
    for row, found in zip(rows, tokenize(rows, tokenizer), strict=True):
        for side, text in zip(("chosen_ids", "rejected_ids"), texts_of(row, tokenizer)[1:], strict=True):
            assert found["prompt_ids"] + found[side] == tokenizer.encode(
                text, add_special_tokens=rows is TEXT_ROWS
            )


def test_ids_of_a_text_row_spelled_out() -> None:
    tokenizer = make_byte_tokenizer()
    (found,) = tokenize([{"prompt": "Hi", "chosen": "!", "rejected": "??"}], tokenizer)
    assert [
        tokenizer.convert_ids_to_tokens(found[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ] == [
        ["H", "i"],
        ["!", EOS],
        ["?", "?", EOS],
    ]
    assert not found["moved_boundary"]


def test_ids_of_a_conversation_spelled_out() -> None:
    tokenizer = make_byte_tokenizer()
    (found,) = tokenize(
        [{"prompt": [user("Hi")], "chosen": [assistant("!")], "rejected": [assistant("??")]}], tokenizer
    )
    assert tokenizer.decode(found["prompt_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found["chosen_ids"]) == "!<|im_end|>\n"
    assert tokenizer.decode(found["rejected_ids"]) == "??<|im_end|>\n"


def test_an_answer_that_ends_in_the_eos_token_gets_no_second_one() -> None:
    tokenizer = make_byte_tokenizer()
    with_it, without = tokenize(
        [
            {"prompt": "Hi", "chosen": f"!{EOS}", "rejected": "?"},
            {"prompt": "Hi", "chosen": "!", "rejected": "?"},
        ],
        tokenizer,
    )
    assert with_it["chosen_ids"] == without["chosen_ids"] == tokenizer.encode(f"!{EOS}")


def test_a_bos_token_stands_once_before_text_and_not_before_a_rendered_template(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizers["prefix space"]
    for found in tokenize(TEXT_ROWS, tokenizer):
        assert found["prompt_ids"][0] == tokenizer.bos_token_id
        assert (found["prompt_ids"] + found["chosen_ids"] + found["rejected_ids"]).count(
            tokenizer.bos_token_id
        ) == 1
    for found in tokenize(CHAT_ROWS, tokenizer):
        assert tokenizer.bos_token_id not in found["prompt_ids"] + found["chosen_ids"] + found["rejected_ids"]


def test_tokens_that_merge_across_the_boundary_move_it_and_stay_in_the_answer() -> None:
    tokenizer = make_byte_tokenizer([("b", "c")])
    moved, kept = tokenize(
        [{"prompt": "ab", "chosen": "cd", "rejected": "x"}, {"prompt": "ab", "chosen": "x", "rejected": "d"}],
        tokenizer,
    )
    assert moved["moved_boundary"]
    assert [
        tokenizer.convert_ids_to_tokens(moved[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ] == [
        ["a"],
        ["bc", "d", EOS],
        ["b", "x", EOS],
    ]
    assert not kept["moved_boundary"]
    assert tokenizer.convert_ids_to_tokens(kept["prompt_ids"]) == ["a", "b"]


@pytest.mark.parametrize("merging", ["chosen", "rejected"])
def test_either_answer_can_move_the_boundary_of_both(merging: str) -> None:
    tokenizer = make_byte_tokenizer([("b", "c")])
    (found,) = tokenize([{"prompt": "ab", "chosen": "x", "rejected": "x", merging: "cd"}], tokenizer)
    assert found["moved_boundary"]
    assert tokenizer.convert_ids_to_tokens(found["prompt_ids"]) == ["a"]
    assert {tokenizer.decode(found["chosen_ids"]), tokenizer.decode(found["rejected_ids"])} == {
        f"bcd{EOS}",
        f"bx{EOS}",
    }


def test_a_boundary_moves_in_conversations_too() -> None:
    tokenizer = make_byte_tokenizer([("b", "c")])
    tokenizer.chat_template = MERGED_TEMPLATE
    (found,) = tokenize(
        [{"prompt": [user("ab")], "chosen": [assistant("cd")], "rejected": [assistant("ce")]}], tokenizer
    )
    assert found["moved_boundary"]
    assert [
        tokenizer.convert_ids_to_tokens(found[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ] == [
        ["a"],
        ["bc", "d"],
        ["bc", "e"],
    ]


def test_a_generation_prompt_that_the_answers_do_not_repeat_is_left_out_and_marked() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    (found,) = tokenize(
        [{"prompt": [user("Hi")], "chosen": [assistant("!")], "rejected": [assistant("?")]}], tokenizer
    )
    assert found["moved_boundary"]
    assert tokenizer.decode(found["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(found["chosen_ids"]) == "!<|im_end|>\n"


def test_rows_keep_their_order_and_numbers_over_several_batches() -> None:
    tokenizer = make_byte_tokenizer()
    rows = [{"prompt": f"{number}?", "chosen": "a", "rejected": "b"} for number in range(2100)]
    found = tokenize(rows, tokenizer)
    assert [row["row"] for row in found] == list(range(2100))
    assert [tokenizer.decode(row["prompt_ids"]) for row in found] == [row["prompt"] for row in rows]


def test_only_the_columns_of_ids_are_kept() -> None:
    found = tokenize_rows(Dataset.from_list([{**TEXT_ROWS[0], "score": 1.0}]), "text", make_byte_tokenizer())
    assert found.column_names == [
        "row",
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "moved_boundary",
        "dropped",
        "problem",
        "notes",
    ]


def test_conversations_without_a_chat_template_say_how_to_give_one(tmp_path: Path) -> None:
    plain = make_byte_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        tokenize(CHAT_ROWS, load_tokenizer(str(tmp_path)))
    assert str(caught.value) == (
        f"the data holds conversations, but the tokenizer {tmp_path} has no chat template.\n"
        "Give one with `chat_template` FILE (Jinja), or a tokenizer that has one with `tokenizer`."
    )


def test_text_needs_no_chat_template() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = None
    assert tokenize(TEXT_ROWS, tokenizer) == tokenize(TEXT_ROWS, make_byte_tokenizer())


def test_text_without_an_eos_token_is_refused() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        ModelError,
        match=r"^the tokenizer .* has no EOS token to end an answer with.\nGive another with `tokenizer`.$",
    ):
        tokenize(TEXT_ROWS, tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no roles here') }}", "no roles here"),
        ("{% for %}", "Expected an expression, got 'end of"),
    ],
)
def test_a_template_that_refuses_a_conversation_is_reported(template: str, reason: str) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError) as caught:
        tokenize(CHAT_ROWS, tokenizer)
    assert f"the chat template refuses it ({reason}" in str(caught.value)
    assert "): 4 rows, number 0, 1, 2, 3\n" in str(caught.value)


# -- what datasets keeps -----------------------------------------------------------------------------------


def test_the_same_data_and_tokenizer_are_tokenized_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", CHAT_ROWS)
    first, again = (
        tokenize_rows(read_dataset(path)["train"], "conversation", make_byte_tokenizer()) for _ in range(2)
    )
    assert again.cache_files == first.cache_files != []
    assert again.to_list() == first.to_list()


def test_another_template_gives_other_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", CHAT_ROWS)
    for template in (
        make_byte_tokenizer().chat_template,
        THINKING_TEMPLATE,
        MERGED_TEMPLATE,
        make_byte_tokenizer().chat_template,
    ):
        tokenizer = make_byte_tokenizer()
        tokenizer.chat_template = template
        found = without_notes(tokenize_rows(read_dataset(path)["train"], "conversation", tokenizer))
        assert found == [naive_row(number, row, tokenizer) for number, row in enumerate(CHAT_ROWS)]


def test_another_vocabulary_gives_other_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", TEXT_ROWS)
    for merges in ([], [("t", "h")], [("t", "h"), ("th", "e")]):
        tokenizer = make_byte_tokenizer(merges)
        found = without_notes(tokenize_rows(read_dataset(path)["train"], "text", tokenizer))
        assert found == [naive_row(number, row, tokenizer) for number, row in enumerate(TEXT_ROWS)]


def test_changed_rows_give_other_ids(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer()
    for rows in (TEXT_ROWS, TEXT_ROWS[::-1], TEXT_ROWS[:2]):
        dataset = read_dataset(write_lines(tmp_path / "pairs.jsonl", rows))["train"]
        assert without_notes(tokenize_rows(dataset, "text", tokenizer)) == [
            naive_row(number, row, tokenizer) for number, row in enumerate(rows)
        ]


def test_a_limit_gives_the_first_ids(tmp_path: Path) -> None:
    path, tokenizer = write_lines(tmp_path / "pairs.jsonl", TEXT_ROWS), make_byte_tokenizer()
    for limit in (5, 2, None):
        found = without_notes(tokenize_rows(read_dataset(path, limit=limit)["train"], "text", tokenizer))
        assert found == [naive_row(number, row, tokenizer) for number, row in enumerate(TEXT_ROWS[:limit])]


def test_special_tokens_that_are_split_give_other_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", TEXT_ROWS)
    for split in (False, True):
        tokenizer = make_byte_tokenizer()
        tokenizer.split_special_tokens = split
        found = without_notes(tokenize_rows(read_dataset(path)["train"], "text", tokenizer))
        assert found == [naive_row(number, row, tokenizer) for number, row in enumerate(TEXT_ROWS)]


def test_padding_and_truncation_that_a_tokenizer_comes_with_do_not_change_the_ids() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert tokenize(TEXT_ROWS, tokenizer) == tokenize(TEXT_ROWS, make_byte_tokenizer())


CALLING = [
    user("Weather?"),
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]},
    message("tool", "blue"),
]


def test_a_template_that_leaves_tool_calls_out_is_reported() -> None:
    rows = [{"prompt": CALLING, "chosen": [assistant("Fine.")], "rejected": [assistant("No.")]}]
    with pytest.raises(
        DataError,
        match="the chat template leaves its tool calls out; give one that writes them with "
        "`chat_template`: 1 row, number 0",
    ):
        tokenize(rows, make_byte_tokenizer())


def test_tool_calls_reach_the_ids() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}:{{ message['content'] }}{% for call in "
        "message['tool_calls'] %}"
        "[{{ call['function']['name'] }}]{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt "
        "%}assistant:{% endif %}"
    )
    (row,) = tokenize(
        [{"prompt": CALLING, "chosen": [assistant("Fine.")], "rejected": [assistant("No.")]}], tokenizer
    )
    assert tokenizer.decode(row["prompt_ids"]) == "user:Weather?\nassistant:[look]\ntool:blue\nassistant:"


def test_sharegpt_turns_of_tools_make_the_ids_of_tool_messages() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}:{{ message['content'] "
        "}}{{ message['tool_calls'] }}\n{% endfor %}"
    )
    turns = [
        ("human", "Weather?"),
        ("function_call", '{"name": "look", "arguments": {"at": "sky"}}'),
        ("observation", "blue"),
    ]
    sharegpt = {
        "conversations": [{"from": role, "value": value} for role, value in turns],
        "chosen": {"from": "gpt", "value": "Fine."},
        "rejected": {"from": "gpt", "value": "No."},
    }
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}],
    }
    messages = {
        "prompt": [user("Weather?"), call, message("tool", "blue")],
        "chosen": [assistant("Fine.")],
        "rejected": [assistant("No.")],
    }
    found = [
        tokenize_rows(Dataset.from_list([row]), kind, tokenizer)[0]
        for row, kind in ((sharegpt, "sharegpt"), (messages, "conversation"))
    ]
    assert found[0] == found[1]


TEXT = {"prompt": "Name a colour.", "chosen": " Red.", "rejected": " Seven."}


def test_all_unusable_rows_are_reported_at_once() -> None:
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


def test_a_single_unusable_row_is_reported_in_the_singular() -> None:
    with pytest.raises(
        DataError,
        match=r"^the data: 1 row cannot be used \(rows are counted from 0, format text\):\n  `chosen` is empty: 1 row, number 0\n",
    ):
        tokenize_rows(Dataset.from_list([{**TEXT, "chosen": ""}]), "text", make_byte_tokenizer())
