"""Chat templates that write the day."""

from datetime import date, datetime

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import tokenize_rows
from dpo_cache.data.template_date import DIRECTIVES, with_template_date, writes_day
from tests.data.conftest import CHATML, assistant, make_byte_tokenizer, user

DAY = date(2026, 3, 5)
LLAMA = (
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n"
    "{%- endif %}\n"
    "{{- 'Today Date: ' + date_string + '\\n\\n' }}" + CHATML
)
IN_MACRO = (
    "\n    {% macro system() %}Current date: {{ strftime_now('%Y-%m-%d') }}{% endmacro %}"
    "{% for message in messages %}{{ system() }}{{ message.content }}{% endfor %}"
)
ROW = {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


def with_template(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def render(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.apply_chat_template([user("Hi")], tokenize=False)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA, "Today Date: 05 Mar 2026\n\n<|im_start|>user\nHi<|im_end|>\n"),
        (IN_MACRO, "\nCurrent date: 2026-03-05Hi"),
        ("  {% if true %}{{ strftime_now(format='%A %-d, 100%%') }}{% endif %}", "Thursday 5, 100%"),
        ("{{ strftime_now('%H:%M %%d') }}", "00:00 %d"),
    ],
)
def test_a_template_writes_the_given_day(template: str, expected: str) -> None:
    tokenizer = with_template(template)
    assert writes_day(tokenizer)
    assert render(with_template_date(tokenizer, DAY)) == expected
    assert tokenizer.chat_template == template


def test_each_directive_is_that_of_strftime() -> None:
    written = "|".join(DIRECTIVES)
    tokenizer = with_template("{{ strftime_now('" + written + "') }}")
    assert render(with_template_date(tokenizer, DAY)) == datetime(2026, 3, 5).strftime(written)


def test_named_templates_write_the_given_day() -> None:
    tokenizer = with_template_date(with_template({"default": LLAMA, "tool_use": CHATML}), DAY)
    assert render(tokenizer).startswith("Today Date: 05 Mar 2026\n")
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert tokenizer.apply_chat_template([user("Hi")], tools=tools, tokenize=False).startswith("<|im_start|>")


def test_other_templates_are_not_changed() -> None:
    tokenizer = make_byte_tokenizer()
    assert with_template_date(tokenizer, DAY) is tokenizer
    tokenizer.chat_template = None
    assert with_template_date(tokenizer, DAY) is tokenizer


def test_rows_are_tokenized_again_for_another_day() -> None:
    tokenizer, rows = with_template(LLAMA), Dataset.from_list([ROW])
    first, other, again = (
        tokenize_rows(rows, "conversation", tokenizer, template_date=day)[0]["prompt_ids"]
        for day in (DAY, date(2026, 3, 6), DAY)
    )
    assert tokenizer.decode(first).startswith("Today Date: 05 Mar 2026\n")
    assert tokenizer.decode(other).startswith("Today Date: 06 Mar 2026\n")
    assert first == again
