from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import load_tokenizer, tokenize_rows
from dpo_cache.data.early_answers import END_TOKEN, GENERATION_PROMPT, LINE_BREAKS
from tests.data.checkpoints import FAMILIES, save_checkpoint
from tests.data.conftest import CHATML, assistant, make_byte_tokenizer, user
from tests.data.kinds import KINDS

GENERATION_AND_THOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
# the answer begins with an empty thought, whose line breaks are one token
EMPTY_THOUGHT = GENERATION_AND_THOUGHT.replace(
    "<|im_start|>{{ message['role'] }}\n",
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}",
)
# a prompt is rendered with its role in capitals, and otherwise when an answer follows
OTHER_WITH_ANSWER = CHATML.replace(
    "{{ message['role'] }}\n", "{{ message['role'] if messages[1:] else message['role'] | upper }}\n"
)
GLUED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def notes_and_boundary(
    tokenizer: PreTrainedTokenizerFast, prompt: Any, chosen: Any, rejected: Any, **columns: Any
) -> tuple[list[str], bool]:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}
    data_format = "text" if isinstance(prompt, str) else "conversation"
    (found,) = tokenize_rows(Dataset.from_list([row]), data_format, tokenizer)
    return found["notes"], found["moved_boundary"]


CHATS: dict[str, tuple[str, list[tuple[str, str]], tuple[list[str], bool]]] = {
    "the same start": (CHATML, [], ([], False)),
    "a thought that no answer begins with": (GENERATION_AND_THOUGHT, [], ([GENERATION_PROMPT], True)),
    "an empty thought": (EMPTY_THOUGHT, [("Ċ", "Ċ")], ([GENERATION_PROMPT], True)),
    "other messages with an answer": (OTHER_WITH_ANSWER, [], ([], True)),
    "no generation prompt": (GLUED, [("b", "c")], ([], True)),
}


@pytest.mark.parametrize(("template", "merges", "expected"), CHATS.values(), ids=CHATS)
def test_a_move_within_the_generation_prompt_is_normal(
    template: str, merges: list[tuple[str, str]], expected: tuple[list[str], bool]
) -> None:
    tokenizer = make_byte_tokenizer(merges)
    tokenizer.chat_template = template
    assert notes_and_boundary(tokenizer, [user("ab")], [assistant("cd")], [assistant("ce")]) == expected


def test_the_generation_prompt_is_that_of_the_options_of_the_row() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "assistant\n{% endif", "assistant\n{% if thinks %}<think>{% endif %}{% endif"
    )
    row = ([user("a")], [assistant("b")], [assistant("c")])
    assert notes_and_boundary(tokenizer, *row, chat_template_kwargs={"thinks": True}) == (
        [GENERATION_PROMPT],
        True,
    )
    assert notes_and_boundary(tokenizer, *row, chat_template_kwargs={"thinks": False}) == ([], False)


TEXTS: dict[str, tuple[str, str, list[tuple[str, str]], tuple[list[str], bool]]] = {
    "clean": ("a:", " b", [("Ġ", "b")], ([], False)),
    "a space at the end of the prompt": ("a: ", "b", [("Ġ", "b")], ([], True)),
    "a word in two": ("an", "d", [("n", "d")], ([], True)),
    "a line break": ("a:\n", "b", [("Ċ", "b")], ([LINE_BREAKS], True)),
    "line breaks": ("a:\n\n", "b", [("Ċ", "b")], ([LINE_BREAKS], True)),
    "a line break and a space": ("a:\n ", "b", [("Ġ", "b")], ([], True)),
    "a letter before the line break": ("a\n", "b", [("a", "Ċ"), ("aĊ", "b")], ([], True)),
}


@pytest.mark.parametrize(("prompt", "answer", "merges", "expected"), TEXTS.values(), ids=TEXTS)
def test_line_breaks_that_merge_with_text_are_normal(
    prompt: str, answer: str, merges: list[tuple[str, str]], expected: tuple[list[str], bool]
) -> None:
    tokenizer = make_byte_tokenizer(merges)
    assert notes_and_boundary(tokenizer, prompt, answer, answer + "!") == expected


def test_a_token_that_is_added_after_each_text_is_normal() -> None:
    tokenizer = make_byte_tokenizer()
    end = ("<|im_end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[end]
    )
    assert notes_and_boundary(tokenizer, "a:", " b", " c") == ([END_TOKEN], True)


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_rows_are_normal_under_the_template_of_each_family(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_checkpoint(family, tmp_path))
    for prompt in ([user("Hi")], [user("Hi"), assistant("Hello."), user("And now?")]):
        notes, has_moved = notes_and_boundary(tokenizer, prompt, [assistant("Yes.")], [assistant("No.")])
        assert notes == ([GENERATION_PROMPT] if has_moved else [])
        assert has_moved == (family == "deepseek-r1")  # it ends a prompt with <think>


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")  # transformers, for a Python tokenizer
@pytest.mark.parametrize("kind", KINDS)
def test_clean_text_is_normal_with_each_kind_of_tokenizer(kind: str) -> None:
    notes, has_moved = notes_and_boundary(KINDS[kind](), "Question: what?\nAnswer:", " the cat", " the dog")
    assert notes == ([END_TOKEN] if has_moved else [])
