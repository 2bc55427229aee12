"""Parts encoded once and joined equal the ids of the tokenizer's own call."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from dpo_cache.data.boundary import EXPRESSIONS, can_be_cut, last_cut
from dpo_cache.data.encode import _cutting_tokens, encode_continuations, encode_dialogues, encode_texts
from tests.data.conftest import (
    make_byte_tokenizer,
    make_prefix_space_tokenizer,
    make_trained_tokenizer,
    wrap,
)
from tests.data.kinds import adding, tiktoken_rules

TOKENIZERS = {
    "bytes": make_byte_tokenizer(),
    "byte-level BPE": make_trained_tokenizer(),
    "prefix space": make_prefix_space_tokenizer(),
}
pieces = st.lists(
    st.sampled_from(
        [
            "<|im_start|>",
            "<|im_end|>",
            "<s>",
            "user",
            "the cat",
            " the",
            "\n",
            "\n\n",
            " ",
            "é🙂",
            "<|",
            "im_start|>",
            "Ġ",
            "▁",
        ]
    ),
    max_size=6,
).map("".join)


def own_call(tokenizer: PreTrainedTokenizerFast, group: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in group]


@pytest.mark.rotating(3)
@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(prompt=pieces, answers=st.lists(pieces, min_size=1, max_size=3))
def test_a_shared_head_changes_no_id(kind: str, prompt: str, answers: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    group = [prompt, *(prompt + answer for answer in answers)]
    assert encode_dialogues(tokenizer, [group, answers]) == [
        own_call(tokenizer, group),
        own_call(tokenizer, answers),
    ]


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
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken("<|x|>", normalized=False, **{flaw: True})]}
        )
    assert "<|x|>" not in _cutting_tokens(tokenizer)
    group = ["a <|x|>", "a <|x|>yb", "a <|x|> b"]
    assert encode_dialogues(tokenizer, [group]) == [own_call(tokenizer, group)]


def test_tokens_in_reserve_are_not_searched() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|reserved_{number}|>" for number in range(500)]}
    )
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


# -- plain text, cut between two words -----------------------------------------------------------------


def make_split_tokenizer(expression: str) -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen 2 are: words by an expression, then bytes; a BOS token and NFC."""
    rules = adding(tiktoken_rules(expression, normalizer=normalizers.NFC()), before="<s>")
    return wrap(rules, bos_token="<s>")


def make_digits_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_trained_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    return tokenizer


CUT = {
    "byte-level BPE": make_trained_tokenizer(),
    "digits": make_digits_tokenizer(),
    "prefix space": make_prefix_space_tokenizer(),
    **{
        f"split {number}": make_split_tokenizer(expression)
        for number, expression in enumerate(sorted(EXPRESSIONS))
    },
}
words = st.lists(
    st.sampled_from(
        ["the cat", " the", " sat", "cat", "a b", "'s a", "'", " ", "  ",
         "\n", " \n ", "12", " 1 a", "é", "e\u0301 a", "\u0301", " 🙂", "don't", ".", "<|",
         "<|im_end|>", " <|im_end|> a", "a<s>", "▁", "▁a", "\t", "\u00a0a", "Ġ", " on the mat"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@pytest.mark.rotating(3)
@pytest.mark.parametrize("kind", CUT)
@settings(deadline=None, max_examples=400)
@given(prompt=words, answers=st.lists(words, min_size=1, max_size=3))
def test_a_cut_between_words_changes_no_id(kind: str, prompt: str, answers: list[str]) -> None:
    tokenizer = CUT[kind]
    assert can_be_cut(tokenizer)
    group = [prompt, *(prompt + answer for answer in answers)]
    assert encode_continuations(tokenizer, [group]) == [[tokenizer(text)["input_ids"] for text in group]]


@pytest.mark.rotating(3)
@pytest.mark.parametrize("kind", CUT)
@settings(deadline=None, max_examples=400)
@given(text=words)
def test_any_such_cut_would_do(kind: str, text: str) -> None:
    tokenizer = CUT[kind]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    for place in range(1, len(text) - 1):
        if last_cut(text[: place + 2]) == place:
            parts = [
                tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (text[:place], text[place:])
            ]
            assert parts[0] + parts[1] == whole


def test_where_the_last_cut_is() -> None:
    assert [
        last_cut(text)
        for text in ("", "a", "a b", "a b c", "a  b", "a 1 b", "a b.", "é b", "a b ", " b", "a b 7")
    ] == [
        0,
        0,
        1,
        3,
        0,
        0,
        1,
        0,
        1,
        0,
        1,
    ]


def with_added(content: str, **flaws: bool) -> PreTrainedTokenizerFast:
    tokenizer = make_trained_tokenizer()
    tokenizer.add_tokens([AddedToken(content, **flaws)])
    return tokenizer


def with_part(**parts: object) -> PreTrainedTokenizerFast:
    tokenizer = make_trained_tokenizer()
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_spaced_merge(*steps: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    """A merge across words, behind these steps."""
    tokenizer = make_byte_tokenizer([("a", "Ġ"), ("aĠ", "b")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


def with_spaced_token() -> PreTrainedTokenizerFast:
    """A merge across words, which a model without words can have."""
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    vocabulary = {token: number for number, token in enumerate([*letters, "a▁", "a▁b"])}
    rules = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "▁"), ("a▁", "b")]))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    return wrap(rules)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WHOLE = {
    "added token with a space": with_added("a b"),
    "added token that takes spaces": with_added("xx", rstrip=True),
    "added token that is a word": with_added("xx", single_word=True),
    "normalizer": with_part(normalizer=normalizers.Prepend("▁")),
    "no words": with_part(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "words of bytes": with_spaced_merge(
        BYTES, pre_tokenizers.Split(Regex(sorted(EXPRESSIONS)[0]), "isolated")
    ),
    "words of bytes, as GPT-2 parts them": with_spaced_merge(
        BYTES, pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "words put together": with_spaced_merge(
        pre_tokenizers.Split(Regex(sorted(EXPRESSIONS)[0]), "contiguous"), BYTES
    ),
    "words merged, then parted": with_spaced_merge(
        pre_tokenizers.Split(Regex(sorted(EXPRESSIONS)[0]), "merged_with_previous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "other words": with_part(pre_tokenizer=pre_tokenizers.Split(Regex("a b"), "isolated")),
    "spaced token": with_spaced_token(),
    "bytes": make_byte_tokenizer([("a", "Ġ"), ("aĠ", "b")]),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_other_tokenizers_are_not_cut(kind: str) -> None:
    tokenizer = WHOLE[kind]
    assert not can_be_cut(tokenizer)
    group = ["xx a b", "xx a b c", "xx a b xx d"]
    assert encode_continuations(tokenizer, [group]) == [[tokenizer(text)["input_ids"] for text in group]]


def test_tokens_added_around_a_text_are_around_the_parts() -> None:
    tokenizer = make_split_tokenizer(sorted(EXPRESSIONS)[0])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>",
        special_tokens=[("<s>", 0), ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))],
    )
    group = ["the cat", "the cat sat"]
    assert encode_continuations(tokenizer, [group]) == [[tokenizer(text)["input_ids"] for text in group]]
    assert encode_continuations(tokenizer, [group])[0][1][0] == 0
