"""Each example in the tables of docs/data.md has the format and the pairs that the page says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import dpo_cache
from dpo_cache.data import detect_format, tokenize_rows
from dpo_cache.data.formats import FORMATS
from tests.data.conftest import make_byte_tokenizer

DATA_PAGE = (Path(dpo_cache.__file__).parents[1] / "docs" / "data.md").read_text()
PAGE_ROWS = re.findall(r"^\| `(\w+)` \| .* \| `(\{.*\})` \|$", DATA_PAGE, re.M)
MORE = DATA_PAGE[DATA_PAGE.index("### More shapes") : DATA_PAGE.index("### How rows are read")]
ROWS = re.findall(r"^\| (.*) \| `(\{.*\})` \|$", MORE, re.M)

USER, BEGIN, END = "<|im_start|>user\n2+2?<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n"
CALL = '<|im_start|>assistant\nadd({"a": 2})<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n'
EXPECTED = {
    "prompt as text, repeated in the answers or not": (
        "conversation",
        USER + BEGIN,
        [("4." + END, "5." + END)],
    ),
    "messages with `tools`": ("conversation", "tools: add\n" + USER + BEGIN, [("4." + END, "5." + END)]),
    "`chosen`, `rejected` as whole dialogues in text": (
        "implicit",
        "\n\nHuman: 2+2?\n\nAssistant:",
        [(" 4.<|im_end|>", " It depends.<|im_end|>")],
    ),
    "ShareGPT with tools": ("sharegpt", USER + CALL + BEGIN, [("4." + END, "5." + END)]),
    "Alpaca: `instruction`, `input`, `chosen`, `rejected`; `system`, `history` if there": (
        "alpaca",
        "<|im_start|>user\nAdd.\n\n2, 2<|im_end|>\n" + BEGIN,
        [("4." + END, "Well..." + END)],
    ),
    "`question`, `chosen`, `rejected`; `system` if there": (
        "question",
        "<|im_start|>system\nBe brief.<|im_end|>\n" + USER + BEGIN,
        [("4." + END, "Well..." + END)],
    ),
    "ranked: `prompt`, `responses`, `scores` or `ranks`": (
        "ranked",
        "2+2?",
        [
            (" 4.<|im_end|>", " Four?<|im_end|>"),
            (" 4.<|im_end|>", " 5.<|im_end|>"),
            (" Four?<|im_end|>", " 5.<|im_end|>"),
        ],
    ),
}
TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}{{ '\\n' }}{% "
    "endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}{% for call in message['tool_calls'] %}{{ call['function']['name'] }}"
    "({{ call['function']['arguments'] | tojson }}){% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_shapes_of_the_page_are_those_tested_here() -> None:
    assert [columns for columns, _ in ROWS] == list(EXPECTED)


@pytest.mark.parametrize(("columns", "example"), ROWS, ids=[columns for columns, _ in ROWS])
def test_a_shape_is_read_as_it_says(columns: str, example: str) -> None:
    row: dict[str, Any] = json.loads(example)
    data_format, prompt, pairs = EXPECTED[columns]
    assert detect_format(list(row), row) == data_format
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenized = tokenize_rows(Dataset.from_list([row]), data_format, tokenizer).to_list()
    assert all(tokenizer.decode(made["prompt_ids"]) == prompt for made in tokenized)
    assert [
        (tokenizer.decode(made["chosen_ids"]), tokenizer.decode(made["rejected_ids"])) for made in tokenized
    ] == pairs


def test_the_page_shows_every_format_in_the_order_in_which_they_are_tried() -> None:
    assert list(dict.fromkeys(name for name, _ in PAGE_ROWS)) == list(FORMATS)
    named = re.findall(r"^\| `(\w+)` \|", DATA_PAGE[DATA_PAGE.index("## Public data sets") :], re.M)
    assert set(named) == set(FORMATS)


@pytest.mark.parametrize(("data_format", "example"), PAGE_ROWS, ids=[name for name, _ in PAGE_ROWS])
def test_an_example_of_the_page_is_the_same_pair_in_each_format(data_format: str, example: str) -> None:
    row: dict[str, Any] = json.loads(example)
    assert detect_format(list(row), row) == data_format
    tokenizer = make_byte_tokenizer()
    (made,) = tokenize_rows(Dataset.from_list([row]), data_format, tokenizer).to_list()
    shown = tuple(tokenizer.decode(made[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    text, dialogue = ("2+2?", " 4.<|im_end|>", " 5.<|im_end|>"), (USER + BEGIN, "4." + END, "5." + END)
    assert shown == (text if row.get("prompt") == "2+2?" and "role" not in example else dialogue)
