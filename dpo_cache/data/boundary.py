"""Where a text can be cut in two so that the parts have the ids of the whole: between a letter and a space
before a letter.

A tokenizer normalizes, parts the text at its added tokens, parts it into words, and encodes each word by
itself. The ids of `A + B` are those of `A` and of `B` if each of these steps leaves nothing that spans the
cut. Let `A` end in an ASCII letter and `B` begin with a space and an ASCII letter:

- Normalizers: none, or NFC. Nothing composes with the letter before it across a space.
- Added tokens: none has a space in it or takes spaces or words beside it, so none spans the cut, and since
  they are found from left to right those in `A` and in `B` are those of the whole.
- Words by one of the expressions below: no alternative goes on after a letter with a space, so a word ends at
  the cut, and none looks behind, so the words of `B` are found as they are in the whole. Of lookaheads there
  is
  `\\s+(?!\\S)`, which at the end of `A` has a letter before it.
- No words (Metaspace without split): a text is one word of a BPE model, in which spaces are `▁`. If no token
  of its vocabulary has a `▁` after something else, no merge spans the cut, and the merges on either side do
  not see each other. A `▁` that is in the vocabulary is not fused with unknown letters before it.
  A space that `Metaspace` puts before a text that begins with none is put before `A` alone.

Any other tokenizer is left whole.
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
    """Where the last cut of this kind can be made: the place of its space; 0 where there is none."""
    place = text.rfind(" ", 0, len(text) - 1)
    while place > 0 and not (text[place - 1] in LETTERS and text[place + 1] in LETTERS):
        place = text.rfind(" ", 0, place)
    return max(place, 0)


def can_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether such a cut changes no id, for certain; of a tokenizer whose call does no more than its Rust
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
    return _parts_words(backend.pre_tokenizer) or _keeps_words_apart(backend)


def _parts_words(pre_tokenizer: Any) -> bool:
    """Whether it parts the text as it stands into words by one of the expressions; ByteLevel's own is
    GPT-2's.
    """
    state = _state(pre_tokenizer)
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    parted = False
    for step in steps:
        if step["type"] == "ByteLevel":
            parted |= step.get("use_regex", True)
            if not parted:  # spaces are letters to the expressions behind it
                return False
        elif (
            step["type"] == "Split"
            and step["pattern"].get("Regex") in EXPRESSIONS
            and step["behavior"] == "Isolated"
            and not step["invert"]
        ):
            parted = True
        elif step["type"] != "Digits":  # parts at digits alone, each letter by itself
            return False
    return parted


def _keeps_words_apart(backend: Tokenizer) -> bool:
    """Whether a text is one word of a BPE model none of whose tokens has a space in its middle."""
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
