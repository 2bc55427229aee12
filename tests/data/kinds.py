"""Tiny tokenizers of the kinds that checkpoints have, and rows of text and of messages for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.data.checkpoints import row
from tests.data.conftest import CHATML, CORPUS, assistant, message, user

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(rules: Tokenizer, **tokens: Any) -> PreTrainedTokenizerFast:
    """With a chat template whose special tokens are added; the last words say what the tokenizer has none of."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, **{"eos_token": "</s>", **tokens})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def adding(rules: Tokenizer, before: str = "", after: str = "") -> Tokenizer:
    """The rules with tokens that a post-processor adds around a text."""
    single = " ".join(filter(None, (before, "$A", after)))
    tokens = [(token, rules.token_to_id(token)) for token in dict.fromkeys((before, after)) if token]
    rules.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return rules


def tiktoken_rules(expression: str, *, normalizer: Any = None, **model: Any) -> Tokenizer:
    """Words by an expression, then merges of bytes."""
    rules = Tokenizer(models.BPE(**model))
    rules.normalizer = normalizer
    rules.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator(CORPUS, trainer)
    return rules


def sentencepiece_rules(*, is_legacy: bool) -> Tokenizer:
    """As Llama 2 is converted: with `legacy`, the normalizer writes the spaces, and one before every part of a
    text between special tokens; without, the pre-tokenizer, and one before the text only.
    """
    rules = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    rules.train_from_iterator(" ".join(CORPUS).split(" "), trainer)
    if is_legacy:
        rules.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        rules.pre_tokenizer = None
    return adding(rules, before="<s>")


PIECES = ["▁the", "▁cat", "▁c", "at", "▁sat", "▁on", "▁an", "swer", "▁is", "th", "ere", "▁", "▁user", ":"]


def unigram_rules() -> Tokenizer:
    """As T5 is: pieces by likelihood, a space before each word, no letters as bytes, an EOS token after the text.
    The vocabulary is given, as training does not always find the same.
    """
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *map(ord, ".?!,'0123456789"))]
    scores = [(piece, -2.0 - len(piece) / 100) for piece in PIECES] + [(letter, -9.0) for letter in letters]
    rules = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *scores], unk_id=0))
    rules.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    rules.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    rules.decoder = decoders.Metaspace()
    return adding(rules, after="</s>")


def wordpiece_rules() -> Tokenizer:
    """As BERT is: small letters, whole words first, a token before and one after the text."""
    letters = "abcdefghijklmnopqrstuvwxyz?.,!:'0123456789<>|_/"
    pieces = [*letters, *(f"##{letter}" for letter in letters), "the", "cat", "##at", "answer", "is", "there"]
    vocabulary = {piece: number for number, piece in enumerate(("<unk>", "<s>", "</s>", *pieces))}
    rules = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    rules.normalizer = normalizers.BertNormalizer()
    rules.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rules.decoder = decoders.WordPiece()
    return adding(rules, before="<s>", after="</s>")


def gpt_2_rules(*, add_prefix_space: bool = False) -> Tokenizer:
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    rules.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator(CORPUS, trainer)
    return rules


def python_tokenizer() -> PreTrainedTokenizerBase:
    """No Rust in it: a token for each byte, an EOS token after the text."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "GPT-2, pad = EOS": lambda: wrap(gpt_2_rules(), pad_token="</s>"),
    "GPT-2, a space before the text": lambda: wrap(gpt_2_rules(add_prefix_space=True)),
    "tiktoken, BOS added": lambda: wrap(
        adding(tiktoken_rules(LLAMA_3, ignore_merges=True), before="<s>"), bos_token="<s>"
    ),
    "tiktoken, BOS not added": lambda: wrap(
        tiktoken_rules(GPT_4O, normalizer=normalizers.NFC()), bos_token="<s>"
    ),
    "SentencePiece, legacy": lambda: wrap(
        sentencepiece_rules(is_legacy=True), bos_token="<s>", unk_token="<unk>"
    ),
    "SentencePiece": lambda: wrap(sentencepiece_rules(is_legacy=False), bos_token="<s>", unk_token="<unk>"),
    "Unigram, EOS added": lambda: wrap(unigram_rules(), unk_token="<unk>"),
    "WordPiece": lambda: wrap(wordpiece_rules(), bos_token="<s>", unk_token="<unk>"),
    "Python": python_tokenizer,
}

TEXT_ROWS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "the cat sat", "chosen": " on the mat.", "rejected": " there"},
    "no space between": {"prompt": "user: the ca", "chosen": "t is there", "rejected": "ts"},
    "space at the end": {"prompt": "the answer is ", "chosen": "that the cat", "rejected": " that"},
    "line breaks": {"prompt": "what is\n\n", "chosen": "the dog\n", "rejected": "\nthe log"},
    "rendered": {
        "prompt": "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "there<|im_end|>\n",
        "rejected": " on the log<|im_end|>",
    },
    "EOS in the answer": {"prompt": "the", "chosen": " cat</s>", "rejected": "</s> dog"},
    "letters": {"prompt": "É🙂 THE  12345", "chosen": "6 é\u0301", "rejected": "'s 世界"},
}
CHAT_ROWS = {
    "conversation": row([user("what is the answer?")], "the cat", "the dog  sat"),
    "conversation, turns": row(
        [message("system", " the "), user("é"), assistant("🙂"), user("the log\n")], " there", "\nthere"
    ),
}
