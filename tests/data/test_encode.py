"""What is encoded once and put together equals what the tokenizer's own call gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from dpo_cache.data.encode import _cutting_tokens, encode_dialogues, encode_texts
from tests.data.conftest import make_byte_tokenizer, make_prefix_space_tokenizer, make_trained_tokenizer

TOKENIZERS = {
    "bytes": make_byte_tokenizer(),
    "byte-level BPE": make_trained_tokenizer(),
    "prefix space": make_prefix_space_tokenizer(),
}
pieces = st.lists(
    st.sampled_from(["<|im_start|>", "<|im_end|>", "<s>", "user", "the cat", " the", "\n", "\n\n", " ", "é🙂", "<|", "im_start|>", "Ġ", "▁"]),
    max_size=6,
).map("".join)


def own_call(tokenizer: PreTrainedTokenizerFast, group: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in group]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(prompt=pieces, answers=st.lists(pieces, min_size=1, max_size=3))
def test_a_shared_head_changes_no_id(kind: str, prompt: str, answers: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    group = [prompt, *(prompt + answer for answer in answers)]
    assert encode_dialogues(tokenizer, [group, answers]) == [own_call(tokenizer, group), own_call(tokenizer, answers)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_texts_are_encoded_as_by_the_tokenizers_own_call(kind: str, add_special_tokens: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    texts = ["the cat", "", " sat<|im_end|> on", "é🙂"]
    expected = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    assert encode_texts(tokenizer, texts, add_special_tokens=add_special_tokens) == expected


def test_the_heads_are_really_shared() -> None:
    tokenizer = make_byte_tokenizer()
    assert set(_cutting_tokens(tokenizer)) == {"<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("flaw", ["lstrip", "rstrip", "single_word", "longer"])
def test_special_tokens_that_reach_beyond_themselves_cut_nothing(flaw: str) -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template += "<|x|>"
    if flaw == "longer":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>", "<|x|>y"]})
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|x|>", normalized=False, **{flaw: True})]})
    assert "<|x|>" not in _cutting_tokens(tokenizer)
    group = ["a <|x|>", "a <|x|>yb", "a <|x|> b"]
    assert encode_dialogues(tokenizer, [group]) == [own_call(tokenizer, group)]


def test_tokens_in_reserve_are_not_looked_for() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_{number}|>" for number in range(500)]})
    assert len(_cutting_tokens(tokenizer)) <= 3
    group = ["a<|reserved_7|>b<|im_end|>", "a<|reserved_7|>b<|im_end|>c<|reserved_8|>"]
    assert encode_dialogues(tokenizer, [group]) == [own_call(tokenizer, group)]


def test_split_special_tokens_cut_nothing() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.split_special_tokens = True
    group = ["a<|im_end|>", "a<|im_end|>b"]
    assert _cutting_tokens(tokenizer) == []
    assert encode_dialogues(tokenizer, [group]) == [
        [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in group]
    ]
