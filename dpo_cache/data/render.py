"""Examples -> texts -> ids: text as it is, conversations as the chat template renders them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo_cache.data.encode import encode_continuations, encode_dialogues
from dpo_cache.data.examples import Example, RowProblem
from dpo_cache.data.left_out import PROBE, find_left_out
from dpo_cache.errors import ModelError, first_line

# A loop over the content of a message
PARTS = re.compile(r"\bin\s+\w+\s*(?:\.\s*content\b|\[\s*['\"]content['\"]\s*\])")
HAS_BOS = "its prompt begins with the BOS token, so no second one is added"


class Encoded(NamedTuple):
    """Ids of an example's texts: the prompt, then prompt + answer for each answer; and notes on what the
    tokenizer and its chat template left out.
    """

    ids: list[list[int]]
    notes: tuple[str, ...] = ()


def encode_examples(
    examples: Sequence[Example | RowProblem], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | RowProblem]:
    """The ids of each example, or the problem with it.

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
    if any(map(partial(_has_no_template, tokenizer), chats)):
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has the chat templates "
            f"{', '.join(sorted(tokenizer.chat_template))}, and none of them is the default.\n"
            "Choose one with `chat_template` NAME."
        )
    if plain and tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path} has no EOS token to end an answer with.\n"
            "Give another with `tokenizer`."
        )
    plain_ids = iter(_encode_plain(plain, tokenizer))
    chat_ids = iter(_encode_chats(chats, tokenizer))
    return [
        example if isinstance(example, RowProblem) else next(plain_ids if example.is_text else chat_ids)
        for example in examples
    ]


def _has_no_template(tokenizer: PreTrainedTokenizerBase, example: Example) -> bool:
    """Return whether the tokenizer has named templates, and none for this example: `tool_use` is for rows
    with tools, `default` for all others.
    """
    names, options = tokenizer.chat_template, example.template_options
    if not isinstance(names, dict) or "default" in names or "chat_template" in options:
        return False
    return not ("tools" in options and "tool_use" in names)


def _encode_plain(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Ids of examples that are text. Text that begins with the BOS token already gets no second one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token
    for ids in encode_continuations(tokenizer, [_plain_texts(example, eos) for example in examples]):
        if bos is not None and all(text[:2] == [bos, bos] for text in ids):
            yield Encoded([text[1:] for text in ids], (HAS_BOS,))
        else:
            yield Encoded(ids)


def _plain_texts(example: Example, eos: str) -> list[str]:
    """Texts of an example that is text; each answer ends in the EOS token."""
    answers = [answer if answer.endswith(eos) else answer + eos for answer in example.answers]  # type: ignore[union-attr, operator]
    return [example.prompt, *(example.prompt + answer for answer in answers)]  # type: ignore[list-item, operator]


def _encode_chats(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded | RowProblem]:
    """Ids of the texts of conversations; the chat template writes the special tokens."""

    in_parts = bool(examples) and _needs_parts(tokenizer)

    def render(others: Sequence[Example]) -> Sequence[list[str] | RowProblem]:
        return _render([_with_parts(other) for other in others] if in_parts else others, tokenizer)

    rendered = render(examples)
    notes = find_left_out(examples, rendered, tokenizer, render)
    ids = iter(encode_dialogues(tokenizer, [texts for texts in rendered if isinstance(texts, list)]))
    encoded = [texts if isinstance(texts, RowProblem) else next(ids) for texts in rendered]
    return [
        found if isinstance(found, RowProblem) else Encoded(each, tuple(found))  # type: ignore[arg-type]
        for each, found in zip(encoded, notes, strict=True)
    ]


def _render(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Sequence[list[str] | RowProblem]:
    """Texts of conversations: rendered in one call, unless an example has template options or calls tools, or
    the call fails.
    """
    if examples and not any(example.template_options or _arguments(example) for example in examples):
        with suppress(Exception):  # a template is a program and may raise anything; see `_render_one`
            return _render_alike(examples, tokenizer)
    return [_render_one(example, tokenizer) for example in examples]


def _render_one(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str] | RowProblem:
    """Texts of a conversation. Its tool calls have their arguments as objects, or as JSON for a template that
    fails on objects or writes them as Python does.
    """
    rendered = _try_to_render(example, tokenizer)
    objects = [value for value in _arguments(example) if isinstance(value, dict)]
    in_python = [str(value) for value in objects if str(value) != to_json(value)]
    if not objects or not (isinstance(rendered, RowProblem) or _has_any(rendered, in_python)):
        return rendered
    as_text = _try_to_render(_with_text_arguments(example), tokenizer)
    is_written = isinstance(as_text, list) and _has_any(as_text, map(to_json, objects))
    return as_text if is_written else rendered


def _needs_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template writes the content of messages only if it is a list of parts, as
    templates of some models for images and text do.
    """
    if not PARTS.search(str(tokenizer.chat_template)):
        return False
    message: dict[str, Any] = {"role": "user", "content": PROBE}
    one = Example([message], ([{"role": "assistant", "content": "a"}],) * 2)
    text, parts = (_try_to_render(example, tokenizer) for example in (one, _with_parts(one)))
    return not _has_probe(text) and _has_probe(parts)


def _has_probe(rendered: list[str] | RowProblem) -> bool:
    return isinstance(rendered, list) and PROBE in rendered[0]


def _with_parts(example: Example) -> Example:
    """The example with each content as a list of one part."""
    prompt, *answers = (
        [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in part]  # type: ignore[dict-item, index]
        for part in (example.prompt, *example.answers)
    )
    return replace(example, prompt=prompt, answers=tuple(answers))


def _try_to_render(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str] | RowProblem:
    try:
        (rendered,) = _render_alike([example], tokenizer)
    except Exception as error:
        return RowProblem(f"the chat template refuses it ({first_line(error)})")
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


def to_json(value: Any) -> str:
    """JSON as the filter `tojson` of chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)


def _arguments(example: Example) -> list[Any]:
    """The arguments of all tool calls of the example."""
    messages = [message for part in (example.prompt, *example.answers) for message in part]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]  # type: ignore[union-attr]
    return [(call.get("function") or call).get("arguments") for call in calls if isinstance(call, dict)]


def _with_text_arguments(example: Example) -> Example:
    """The example with the arguments of its tool calls as JSON."""
    prompt, *answers = ([*map(_with_text, part)] for part in (example.prompt, *example.answers))
    return replace(example, prompt=prompt, answers=tuple(answers))


def _with_text(message: Any) -> Any:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or call
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else to_json(arguments)
        changed = {**function, "arguments": text}
        calls.append({**call, "function": changed} if call.get("function") else changed)
    return {**message, "tool_calls": calls}


def _has_any(texts: Sequence[str], parts: Iterable[str]) -> bool:
    return any(part in text for part in parts for text in texts)
