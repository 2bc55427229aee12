"""The parts of conversations that the chat template leaves out, found by rendering them without each part.

A template is a program, so what it writes is known only from what it wrote. If a text is the same without the
thoughts, tools or field that a row gives, the template has left them out. Text of messages is looked for in
the rendered text first; only where it is not there, the conversation is rendered again with other text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo_cache.data.examples import Example, RowProblem
from dpo_cache.data.lost import WEIGHTS, is_filled, media_of

Message = dict[str, Any]
Rendered = Sequence[list[str] | RowProblem]  # for each example: the prompt, then prompt + answer
Render = Callable[[Sequence[Example]], Rendered]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # transformers gives a template each for the others
START_OF_THOUGHTS, END_OF_THOUGHTS = "<think>", "</think>"
STANDARD = ("role", "content", "tool_calls", "tool_call_id", *THOUGHTS, *WEIGHTS)
# fields of messages that describe them and are not for the model to read
METADATA = re.compile(
    r"(?:.*_)?(?:id|ids|idx|index|uuid|hash|hashed_ip|timestamp|time|date|created|updated|at|model|model_name|"
    r"source|lang|language|country|state|header|score|scores|rating|ratings|rank|label|labels|votes|tokens|"
    r"token_count|num_tokens|length|len|finish_reason|stop_reason|usage|logprobs|turn|turn_identifier|round|"
    r"toxic|toxicity|redacted|metadata|meta|annotations|feedback|status|end_turn|user)",
    re.IGNORECASE,
)
RENDER_ARGUMENTS = ("tools", "documents")  # arguments of `apply_chat_template` that no template has to name
PROBE = "zq7391"

CALLS_LEFT_OUT = "the chat template leaves its tool calls out; give one that writes them with `chat_template`"
ANSWER_CHANGED = "the chat template leaves out or changes a part of its answers"
ANSWER_THOUGHTS = "the chat template leaves out the thoughts in its answers"


class _Claim(NamedTuple):
    """A part of an example; what is found if a text is the same without it, and if none is."""

    if_same: str | RowProblem
    without: Example
    places: Sequence[int]  # indices of the texts that should differ
    if_not: str | None = None

    def judge(self, texts: list[str] | RowProblem, other: list[str] | RowProblem) -> str | RowProblem | None:
        """The finding, from the texts with and without the part."""
        is_same = (
            isinstance(texts, list)
            and isinstance(other, list)
            and any(_squeezed(texts[place]) == _squeezed(other[place]) for place in self.places)
        )
        return self.if_same if is_same else self.if_not


def find_left_out(
    examples: Sequence[Example], rendered: Rendered, tokenizer: PreTrainedTokenizerBase, render: Render
) -> list[list[str] | RowProblem]:
    """Notes on what the chat template left out of each example, or the problem with it.

    `rendered` are the texts that `render` made of the examples. Messages with only a role and content cost no
    other rendering if their content is in the text.
    """
    template = _Template(tokenizer, render)
    found: list[dict[str | RowProblem, None]] = [{} for _ in examples]
    claims: list[tuple[int, _Claim]] = []
    for number, (example, texts) in enumerate(zip(examples, rendered, strict=True)):
        for entry in _findings(example, texts, template) if isinstance(texts, list) else (texts,):
            if isinstance(entry, _Claim):
                claims.append((number, entry))
            else:
                found[number][entry] = None
    without = render([claim.without for _, claim in claims]) if claims else ()
    for (number, claim), other in zip(claims, without, strict=True):
        if (judged := claim.judge(rendered[number], other)) is not None:
            found[number][judged] = None
    return [
        next((entry for entry in entries if isinstance(entry, RowProblem)), [str(entry) for entry in entries])
        for entries in found
    ]


class _Template:
    """Properties of the chat template, from its text and from one rendering."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, render: Render):
        template = tokenizer.chat_template
        self._text = "\n".join(template.values()) if isinstance(template, dict) else str(template)
        self._render = render
        self.arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters)

    def names(self, name: str) -> bool:
        """Return whether the text of the template has this name."""
        return re.search(rf"\b{re.escape(name)}\b", self._text) is not None

    @cached_property
    def writes_all_fields(self) -> bool:
        """Return whether the template writes fields of messages that it cannot know."""
        return self._writes({"role": "user", "content": "a", PROBE: PROBE})

    @cached_property
    def writes_thoughts(self) -> bool:
        """Return whether the template writes the thoughts of an answer."""
        return self._writes({"role": "assistant", "content": "a", **dict.fromkeys(THOUGHTS, PROBE)})

    def _writes(self, message: Message) -> bool:
        """Return whether the probe is written; also true where the template refuses the message."""
        user = {"role": "user", "content": "a"}
        prompt, answers = ([message], ([user],)) if message["role"] == "user" else ([user], ([message],))
        (texts,) = self._render([Example(prompt, answers)])
        return isinstance(texts, RowProblem) or PROBE in "".join(texts)


def _findings(example: Example, texts: list[str], template: _Template) -> Iterator[str | RowProblem | _Claim]:
    """Notes on the example, and claims that another rendering decides."""
    if example.template_options:
        yield from _option_findings(example, template)
    parts = _parts(example)
    if any(len(message) > 2 for part in parts for message in part):
        yield from _field_findings(example, parts, texts, template)
    for place, text in enumerate(texts):
        yield from _content_findings(example, place, text, _shared_start(texts[0], text) if place else 0)
    yield from _prompt_findings(example, texts)


def _option_findings(example: Example, template: _Template) -> Iterator[str | _Claim]:
    options = example.template_options
    for name, value in options.items():
        if name in RENDER_ARGUMENTS and value:
            rest = {key: other for key, other in options.items() if key != name}
            yield _Claim(
                f"the chat template leaves out its `{name}`", replace(example, template_options=rest), [0]
            )
        elif name not in template.arguments and not template.names(name):
            yield f"the chat template has no use for `{name}` in its `chat_template_kwargs`"


def _field_findings(
    example: Example, parts: list[Any], texts: list[str], template: _Template
) -> Iterator[str | RowProblem | _Claim]:
    if _calls(chain.from_iterable(parts)):
        if any(text.count(name) < count for text, name, count in _counted_calls(parts, texts)):
            yield RowProblem(CALLS_LEFT_OUT)
        yield _without_fields(RowProblem(CALLS_LEFT_OUT), example, ("tool_calls",))
    for name in _filled_fields(parts):
        if name in THOUGHTS:
            if not template.writes_thoughts:
                yield _field_note(name)
            elif name in _filled_fields(example.answers):  # templates cut the thoughts of earlier turns
                yield _without_fields(_field_note(name), example, THOUGHTS, first=1)
        elif name in STANDARD or METADATA.fullmatch(name) or media_of(name):
            continue
        elif template.names(name):
            yield _without_fields(_field_note(name), example, (name,))
        elif not template.writes_all_fields:
            yield _field_note(name)
    for text, answer in zip(texts[1:], parts[1:], strict=True):
        thoughts = [str(message[name]) for message in answer for name in THOUGHTS if message.get(name)]
        if len(thoughts) > 1 and not all(_is_written(thought, text) for thought in thoughts):
            yield ANSWER_THOUGHTS


def _content_findings(example: Example, place: int, text: str, start: int) -> Iterator[str | _Claim]:
    """A finding for each message of this part whose content is not in the rendered text."""
    parts = _parts(example)
    for number, message in enumerate(parts[place]):
        content = message["content"]
        if _is_written(content, text, start):
            continue
        thoughts, _, rest = content.rpartition(END_OF_THOUGHTS)
        if thoughts and _is_written(rest, text, start):
            if place and thoughts.replace(START_OF_THOUGHTS, "").strip():
                yield ANSWER_THOUGHTS
            continue
        yield _without_content(example, place, number, place, ANSWER_CHANGED if place else None)


def _prompt_findings(example: Example, texts: list[str]) -> Iterator[_Claim]:
    """A claim for each message of the prompt that is written only while no answer follows, as Mistral's
    templates do with the system message.
    """
    for number, message in enumerate(_parts(example)[0]):
        content = message["content"]
        rest = content.rpartition(END_OF_THOUGHTS)[2]
        if not _is_written(rest, texts[1]) and _is_written(content, texts[0]):
            yield _without_content(example, 0, number, 1, None)


def _without_content(example: Example, place: int, number: int, text: int, if_not: str | None) -> _Claim:
    """A claim for the content of one message, by its part and its position there, and by the text with it."""
    parts = _parts(example)
    changed = [*parts[place]]
    message = changed[number]
    changed[number] = {**message, "content": f"{PROBE} {message['content']} {PROBE}"}
    return _Claim(
        f"the chat template leaves out the text of messages from {message['role']}",
        _with_parts(example, [changed if place == other else part for other, part in enumerate(parts)]),
        [text],
        if_not,
    )


def _counted_calls(parts: list[Any], texts: list[str]) -> Iterator[tuple[str, str, int]]:
    """Each text, with the name of each tool that its messages call and the number of these calls."""
    before = _calls(parts[0])
    for text, answer in zip(texts, [[], *parts[1:]], strict=True):
        names = before + _calls(answer)
        yield from ((text, name, names.count(name)) for name in dict.fromkeys(names))


def _calls(messages: Iterable[Message]) -> list[str]:
    """Names of the tools that messages call."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return [str((call.get("function") or call).get("name") or "") for call in calls if isinstance(call, dict)]


def _filled_fields(parts: Iterable[Any]) -> list[str]:
    """Names of the fields that hold something in a message. The name of a tool next to its result is none:
    templates have it from the call.
    """
    return list(
        dict.fromkeys(
            name
            for message in chain.from_iterable(parts)
            for name, value in message.items()
            if is_filled(value) and not (name == "name" and message["role"] == "tool")
        )
    )


def _without_fields(
    found: str | RowProblem, example: Example, names: Sequence[str], *, first: int = 0
) -> _Claim:
    """A claim for fields of the prompt, unless `first` is 1, and of the answers."""
    parts = _parts(example)
    bare = [
        [{key: value for key, value in message.items() if key not in names} for message in part]
        if place >= first
        else part
        for place, part in enumerate(parts)
    ]
    places = [place for place, (part, other) in enumerate(zip(parts, bare, strict=True)) if part != other]
    return _Claim(found, _with_parts(example, bare), places)


def _parts(example: Example) -> list[Any]:
    return [example.prompt, *example.answers]


def _with_parts(example: Example, parts: Sequence[Any]) -> Example:
    return replace(example, prompt=parts[0], answers=tuple(parts[1:]))


def _field_note(name: str) -> str:
    return f"the chat template leaves out the `{name}` of messages"


def _is_written(content: str, text: str, start: int = 0) -> bool:
    """Return whether the text has the content, plain or as JSON, but for spaces, ending after `start`."""
    bare = content.strip()
    if not bare or text.rfind(bare) + len(bare) > max(start, len(bare) - 1):
        return True
    squeezed, head = _squeezed(text), len(_squeezed(text[:start]))
    forms = (
        _squeezed(form) for form in (bare, json.dumps(bare)[1:-1], json.dumps(bare, ensure_ascii=False)[1:-1])
    )
    return any(squeezed.rfind(form) + len(form) > max(head, len(form) - 1) for form in forms)


def _shared_start(one: str, other: str) -> int:
    """Number of characters at the start that two texts share, by bisection."""
    if other.startswith(one):
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if other.startswith(one[:middle]) else (low, middle - 1)
    return low


def _squeezed(text: str) -> str:
    """The text without spaces and line breaks."""
    return "".join(text.split())
