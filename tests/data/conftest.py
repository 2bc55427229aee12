"""Small tokenizers of two kinds, and rows of every format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpo_cache.data.examples import Example

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "user: what is the answer?\nassistant: the answer is that the cat is there",
] * 4


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(content: str) -> dict[str, str]:
    return message("user", content)


def assistant(content: str) -> dict[str, str]:
    return message("assistant", content)


def pair(prompt: Any, chosen: Any, rejected: Any) -> Example:
    return Example(prompt, (chosen, rejected))


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def wrap(rules: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rules, eos_token="<|im_end|>", pad_token="<|pad|>", **tokens
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def byte_rules(merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """Byte-level BPE with only these merges, in this order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: number for number, token in enumerate([*letters, *(one + two for one, two in merges)])
    }
    rules = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rules.decoder = decoders.ByteLevel()
    return rules


def make_byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    return wrap(byte_rules(merges))


def make_trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with words split as GPT-2 splits them."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rules.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    return wrap(rules)


def make_prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece models are converted: a space before the text, unknown letters as bytes, a BOS
    token.
    """
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    rules = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    rules.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", "<s>", *letters], show_progress=False
    )
    rules.train_from_iterator(" ".join(CORPUS).split(" "), trainer)
    rules.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", rules.token_to_id("<s>"))]
    )
    return wrap(rules, bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bytes": make_byte_tokenizer(),
        "byte-level BPE": make_trained_tokenizer(),
        "prefix space": make_prefix_space_tokenizer(),
    }
