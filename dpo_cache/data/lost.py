"""What a row holds that is not scored, as notes: media, weights of messages, turns after the answer.

What the chat template leaves out is found by rendering; see `left_out.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

NOUNS = {"image": "images", "video": "videos", "audio": "audio", "file": "files"}
WORDS = {
    "image": "image|img|picture|photo|pixel_value",
    "video": "video|video_frame",
    "audio": "audio|wav|waveform",
}
BEFORE = "(?:input|raw|local|prompt|question|chosen|rejected)_"
AFTER = "path|url|uri|file|filename|file_name|name|byte|base64|b64|data|input|content|chosen|rejected|[0-9]+"
# names of columns, of members of a message and types of content parts: image, image_urls, input_audio, ...
NAMES = {
    medium: re.compile(rf"(?:{BEFORE})?(?:{words})s?(?:_?(?:{AFTER})s?)*", re.IGNORECASE)
    for medium, words in WORDS.items()
}
FILE_TYPES = ("file", "input_file", "document")  # of content parts
# marks that a processor replaces by media: <image>, <image_1>, <|image_pad|>, <|AUDIO|>, <start_of_image>
MARK = re.compile(
    r"<\|?(?:(?:start|begin)_of_)?(image|img|vision|video|audio|speech)"
    r"(?:here|[-_]?(?:[0-9]+|pad|placeholder|token|soft_token|context|start|bos|here))*\|?>",
    re.IGNORECASE,
)
MEDIUM_OF_MARK = {"img": "image", "vision": "image", "speech": "audio"}
NO_MEDIA = ("tools", "tool_calls", "function_call", "functions", "arguments", "chat_template_kwargs")
PLAIN = {"role", "content", "from", "value"}  # fields of an ordinary message
WEIGHTS = ("weight", "loss_weight", "train", "trainable", "loss", "loss_mask", "mask")
AMBIGUOUS = "mask"  # libraries mean opposite things by its values
FULL_WEIGHT = (1, "1", "1.0", "true", "True")

TURNS_AFTER = "the turns after its answer are left out"


def row_notes(row: Mapping[str, Any], parts: Sequence[str | Sequence[Mapping[str, Any]]]) -> list[str]:
    """Notes on what a row holds that is not scored.

    `row` is as it was read; `parts` are the prompt and answers that it makes, as text or messages.
    """
    messages = [part for part in parts if not isinstance(part, str)]
    texts = [part for part in parts if isinstance(part, str)]
    texts += [message["content"] for part in messages for message in part]
    return [*media_notes(row, texts), *weight_notes(messages[1:])]


@lru_cache(maxsize=1024)
def media_of(name: str) -> str | None:
    """The medium that a column, or a member of a message, holds by its name: image, video, audio or none."""
    return next((medium for medium, names in NAMES.items() if names.fullmatch(name)), None)


def media_of_part(part: Mapping[str, Any]) -> str | None:
    """The medium of a content part, such as `{"type": "image_url", "image_url": {"url": ...}}`; None for text
    and for parts of unknown types.
    """
    kind = str(part.get("type") or "")
    if kind in FILE_TYPES:
        return "file"
    named = (media_of(name) for name, value in part.items() if is_filled(value))
    return media_of(kind) or (None if kind else next(filter(None, named), None))


def media_notes(row: Mapping[str, Any], texts: Sequence[str] = ()) -> list[str]:
    """A note for each medium that a row holds, and for marks of a medium in the texts that are scored.

    Media are in columns, in members of messages, or in content parts.
    """
    held = {medium for name, value in row.items() for medium in _media_in(name, value)}
    marked = {medium for text in texts if "<" in text or "[IMG" in text for medium in _marks_in(text)}
    return [
        *(f"its {noun} are left out, because only text is scored".replace("audio are", "audio is")
          for medium, noun in NOUNS.items() if medium in held),
        *(f"its text has marks in place of {noun}, which are scored as text"
          for medium, noun in NOUNS.items() if medium in marked),
    ]  # fmt: skip


def differing_media(one: Any, other: Any) -> str | None:
    """What two answers of a row, as they were read, differ in if it is media: `images`, for example."""
    media = {*_media_in("", one), *_media_in("", other)} if one != other else ()
    return ", ".join(noun for medium, noun in NOUNS.items() if medium in media) or None


def weight_notes(answers: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """A note for each field by which messages of the answers ask for less than full weight in the loss."""
    messages = [message for answer in answers for message in answer]
    return [
        f"the `{name}` of its messages is not used: each token of an answer is scored"
        for name in WEIGHTS
        if any(_has_less_weight(name, message.get(name)) for message in messages)
    ]


def without_turns_after(answers: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The answers, each up to its last message from the assistant, and a note if that cuts one.

    Answers that are text, or have no message from the assistant, are not cut.
    """
    ended = tuple(answer if isinstance(answer, str) else _up_to_assistant(answer) for answer in answers)
    return ended, () if ended == answers else (TURNS_AFTER,)


def is_filled(value: Any) -> bool:
    """Whether a field holds anything: no null, NaN, false or empty text, and no container of only these."""
    if isinstance(value, Mapping):
        return any(is_filled(member) for member in value.values())
    if isinstance(value, (list, tuple)):
        return any(is_filled(member) for member in value)
    if isinstance(value, float):
        return not math.isnan(value)
    return value is not None and value is not False and not (isinstance(value, (str, bytes)) and not value)


def _up_to_assistant(answer: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    ends = [place for place, message in enumerate(answer, 1) if message["role"] == "assistant"]
    return answer[: ends[-1]] if ends else answer


def _media_in(name: str, value: Any) -> Iterator[str]:
    if name in NO_MEDIA:
        return
    if medium := media_of(name):
        if is_filled(value):
            yield medium
    elif isinstance(value, list):
        for member in value:
            if isinstance(member, (list, Mapping)):
                yield from _media_in("", member)
    elif isinstance(value, Mapping):
        if value.keys() <= PLAIN and all(isinstance(member, str) for member in value.values()):
            return
        if kind := media_of_part(value):
            yield kind
        for key, member in value.items():
            yield from _media_in(key, member)


def _marks_in(text: str) -> Iterator[str]:
    if "[IMG]" in text:
        yield "image"
    for mark in MARK.finditer(text):
        word = mark[1].lower()
        if word not in ("video", "audio") or f"</{word}>" not in text.lower():  # else an element of HTML
            yield MEDIUM_OF_MARK.get(word, word)


def _has_less_weight(name: str, value: Any) -> bool:
    return value is not None and (name == AMBIGUOUS or value not in FULL_WEIGHT)
