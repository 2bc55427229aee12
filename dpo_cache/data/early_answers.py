"""Answers that start early: where the ids of prompt + answer do not begin with the ids of the prompt.

The answer starts at the first id that differs, so that each of its tokens is scored, and the end of the
prompt with it. In a few rows that is how tokenizers merge letters. In most rows of a set it is the sign of a
wrong format, such as a prompt that ends in a space or in the middle of a word, or a chat template that
renders the same messages otherwise when an answer follows. Three kinds are normal in all rows of a set:

- A chat template ends the prompt with more than an answer begins with, such as `<think>`, or its last token
  merges with the answer. Then only tokens of the generation prompt move.
- Many tokenizers have one token for two line breaks at the end of a text, and two in front of a letter.
- Some tokenizers add a special token after each text, and so after the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_cache.data.examples import Example

GENERATION_PROMPT = (
    "its answers do not begin with the whole generation prompt of the chat template, and start early"
)
LINE_BREAKS = "line breaks at the end of its prompt merge with its answers, which start early"
END_TOKEN = "the tokenizer adds a token after its prompt, which is left out where an answer follows"
NORMAL = frozenset((GENERATION_PROMPT, LINE_BREAKS, END_TOKEN))


def early_notes(
    example: Example, moved: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """A note if the ids at the end of the prompt that moved into the answers are of a kind that is normal."""
    if not moved:
        return ()
    if isinstance(example.prompt, str):
        return _text_notes(example.prompt, moved, tokenizer)
    options = json.dumps(example.template_options, sort_keys=True, default=str)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    length = _generation_prompt_length(tokenizer, template, options)
    return (GENERATION_PROMPT,) if len(moved) <= length else ()


def _text_notes(prompt: str, moved: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """A note if only line breaks moved, or special tokens that the tokenizer adds after a text."""
    special = set(tokenizer.all_special_ids)
    rest = [number for number in moved if number not in special]
    if not rest:
        return (END_TOKEN,)
    text = str(tokenizer.decode(rest, clean_up_tokenization_spaces=False))
    return (LINE_BREAKS,) if prompt.endswith(("\n", "\r")) and not text.strip() else ()


@lru_cache(maxsize=8)
def _generation_prompt_length(tokenizer: Any, template: str | None, options: str) -> int:
    """Number of tokens that the chat template adds after the last message, for an answer to follow; 0 if it
    cannot be rendered without the row.
    """
    messages = [{"role": "user", "content": "x"}]
    try:
        bare, full = (
            tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=is_added,
                **json.loads(options),
            )
            for is_added in (False, True)
        )
    except Exception:  # a template is a program and may raise anything
        return 0
    if not full.startswith(bare):
        return 0
    return len(tokenizer(full[len(bare) :], add_special_tokens=False)["input_ids"])
