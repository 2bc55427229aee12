"""A cut of a text that changes no id: before a space between two letters.

A tokenizer normalizes a text, splits it at its added tokens, splits the rest into words, and encodes each
word independently. The ids of `A + B` are the ids of `A` and then those of `B` if no step joins the two sides
of the cut. Let `A` end in an ASCII letter and `B` begin with a space and an ASCII letter:

- Normalizers: none, or NFC. Nothing composes with a letter across a space.
- Added tokens: none contains a space or takes neighbouring spaces or words, so none spans the cut. They are
  matched from left to right, so `A` and `B` have the same matches as the whole.
- Words by one of the expressions below: no alternative continues a letter with a space, so a word ends at the
  cut. None looks behind, so `B` has the same words as in the whole. The only lookahead is `\\s+(?!\\S)`; the
  end of `A` is a letter.
- No words (Metaspace without split): a text is one word of a BPE model, in which spaces are `▁`. If no token
  of its vocabulary has a `▁` after another character, no merge spans the cut, and merges on the two sides are
  independent. A `▁` that is in the vocabulary is not fused with unknown letters before it. A space that
  `Metaspace` puts before a text that begins with none comes only before `A`.

With any other tokenizer, texts are not cut.
"""

from __future__ import annotations

import json
import re
import string
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
EXPRESSIONS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + TAIL
    for digits in (r"\p{N}{1,3}", r"\p{N}")  # Llama 3, Qwen 2
)
MARK = "▁"
LETTERS = frozenset(string.ascii_letters)


def last_cut(text: str) -> int:
    """The position of the space of the last such cut; 0 if there is none."""
    place = text.rfind(" ", 0, len(text) - 1)
    while place > 0 and not (text[place - 1] in LETTERS and text[place + 1] in LETTERS):
        place = text.rfind(" ", 0, place)
    return max(place, 0)


def can_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether such a cut changes no id with this tokenizer, whose call does no more than its Rust
    backend.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if tokenizer.split_special_tokens or getattr(backend.model, "dropout", None):
        return False
    if backend.normalizer is not None and _state(backend.normalizer) != {"type": "NFC"}:
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(" " in token.content or token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    return _splits_words(backend.pre_tokenizer) or _keeps_words_apart(backend)


def _splits_words(pre_tokenizer: Any) -> bool:
    """Return whether it splits unchanged text into words by one of the expressions or by ByteLevel's
    (GPT-2's).
    """
    state = _state(pre_tokenizer)
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    is_split = False
    for step in steps:
        if step["type"] == "ByteLevel":
            is_split |= step.get("use_regex", True)
            if not is_split:  # the expressions of later steps take spaces for letters
                return False
        elif (
            step["type"] == "Split"
            and step["pattern"].get("Regex") in EXPRESSIONS
            and step["behavior"] == "Isolated"
            and not step["invert"]
        ):
            is_split = True
        elif step["type"] != "Digits":  # splits only at digits
            return False
    return is_split


def _keeps_words_apart(backend: Tokenizer) -> bool:
    """Return whether a text is one word of a BPE model none of whose tokens has a space in its middle."""
    state, model = _state(backend.pre_tokenizer), backend.model
    if state["type"] != "Metaspace" or state["replacement"] != MARK or not isinstance(model, models.BPE):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix or model.ignore_merges:
        return False
    return _has_marks_first(backend)


@lru_cache(maxsize=2)
def _has_marks_first(backend: Tokenizer) -> bool:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return MARK in vocabulary and not any(re.search(f"[^{MARK}]{MARK}", token) for token in vocabulary)


def _state(part: Any) -> dict[str, Any]:
    """A part of the tokenizer as its JSON."""
    return json.loads(part.__getstate__()) if part is not None else {"type": None}
