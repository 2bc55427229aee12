"""Examples -> texts -> ids: text as it is, conversations as the chat template renders them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_cache.data.encode import encode_continuations, encode_dialogues
from dpo_cache.data.examples import Example, RowProblem
from dpo_cache.errors import ModelError, first_line


def encode_examples(
    examples: Sequence[Example | RowProblem], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]] | RowProblem]:
    """Ids of each example's texts: the prompt, then prompt + answer for each answer.

    Raises `ModelError` for conversations without a chat template, or text without an EOS token.
    """
    usable = [example for example in examples if isinstance(example, Example)]
    plain = [example for example in usable if example.is_text]
    chats = [example for example in usable if not example.is_text]
    if chats and not tokenizer.chat_template:
        raise ModelError(
            f"the data holds conversations, but the tokenizer {tokenizer.name_or_path} has no chat "
            "template.\n"
            "Give one with `chat_template` FILE (Jinja), or a tokenizer that has one with `tokenizer`."
        )
    if plain and tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no EOS token to end an answer with.\n"
            "Give another with `tokenizer`."
        )
    texts = [_plain_texts(example, tokenizer.eos_token) for example in plain]
    plain_ids, chat_ids = iter(encode_continuations(tokenizer, texts)), iter(_encode_chats(chats, tokenizer))
    return [
        example if isinstance(example, RowProblem) else next(plain_ids if example.is_text else chat_ids)
        for example in examples
    ]


def _plain_texts(example: Example, eos: str) -> list[str]:
    """Texts of an example that is text; each answer ends in the EOS token."""
    answers = [answer if answer.endswith(eos) else answer + eos for answer in example.answers]  # type: ignore[union-attr, operator]
    return [example.prompt, *(example.prompt + answer for answer in answers)]  # type: ignore[list-item, operator]


def _encode_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]] | RowProblem]:
    """Ids of the texts of conversations; the chat template writes the special tokens."""
    rendered = _render(examples, tokenizer)
    ids = iter(encode_dialogues(tokenizer, [texts for texts in rendered if isinstance(texts, list)]))
    return [texts if isinstance(texts, RowProblem) else next(ids) for texts in rendered]


def _render(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Sequence[list[str] | RowProblem]:
    """Texts of conversations: rendered in one call, unless an example has template options or calls tools, or
    the call fails.
    """
    if examples and not any(example.template_options or _called_tools(example) for example in examples):
        with suppress(Exception):  # a template is a program and may raise anything; see `_render_one`
            return _render_alike(examples, tokenizer)
    return [_render_one(example, tokenizer) for example in examples]


def _render_one(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str] | RowProblem:
    try:
        (rendered,) = _render_alike([example], tokenizer)
    except Exception as error:
        return RowProblem(f"the chat template refuses it ({first_line(error)})")
    if any(name not in "".join(rendered) for name in _called_tools(example)):
        return RowProblem(
            "the chat template leaves its tool calls out; give one that writes them with `chat_template`"
        )
    return rendered


def _render_alike(examples: Sequence[Example], tokenizer: Any) -> list[list[str]]:
    """Texts of examples that have the same template options."""
    options = examples[0].template_options
    prompts = tokenizer.apply_chat_template(
        [example.prompt for example in examples], tokenize=False, add_generation_prompt=True, **options
    )
    dialogues = [example.prompt + answer for example in examples for answer in example.answers]  # type: ignore[operator]
    rendered = iter(tokenizer.apply_chat_template(dialogues, tokenize=False, **options))
    return [
        [prompt, *islice(rendered, len(example.answers))]
        for prompt, example in zip(prompts, examples, strict=True)
    ]


def _called_tools(example: Example) -> set[str]:
    """Names of the tools that the example's messages call."""
    messages = [message for content in (example.prompt, *example.answers) for message in content]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]  # type: ignore[union-attr]
    return {str((call.get("function") or call).get("name") or "") for call in calls if isinstance(call, dict)}
