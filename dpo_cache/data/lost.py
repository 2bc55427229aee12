"""Notes on the parts of a row that are not scored: media, weights of messages, turns after the answer,
columns.

What the chat template leaves out is found by rendering; see `left_out.py`.
"""

from __future__ import annotations

import math
import mimetypes
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from dpo_cache.data.fields import is_null
from dpo_cache.data.roles import standard_role

NOUNS = {"image": "images", "video": "videos", "audio": "audio", "file": "files"}
WORDS = {
    "image": "image|img|picture|photo|pixel_value|screenshot|thumbnail|jpg|jpeg|png|webp",
    "video": "video|video_frame",
    "audio": "audio|wav|waveform|mp3|flac",
}
BEFORE = "(?:input|raw|local|prompt|question|query|page|context|chosen|rejected)_"
AFTER = "path|url|uri|file|filename|file_name|name|byte|base64|b64|data|input|content|chosen|rejected|[0-9]+"
# names of columns, of members of a message and types of content parts: image, image_urls, input_audio, ...
NAMES = {
    medium: re.compile(rf"(?:{BEFORE})?(?:{words})s?(?:_?(?:{AFTER})s?)*", re.IGNORECASE)
    for medium, words in WORDS.items()
}
FILE_TYPES = ("file", "input_file", "document")  # types of content parts that hold a file
# marks that a processor replaces by media: <image>, <image_1>, <|image_pad|>, <|AUDIO|>, <start_of_image>
MARK = re.compile(
    r"<\|?(?:(?:start|begin)_of_)?(image|img|vision|video|audio|speech)"
    r"(?:here|[-_]?(?:[0-9]+|pad|placeholder|token|soft_token|context|start|bos|here))*\|?>",
    re.IGNORECASE,
)
MEDIUM_OF_MARK = {"img": "image", "vision": "image", "speech": "audio"}
NO_MEDIA = (
    "tools",
    "available_tools",
    "tool_definitions",
    "tool_calls",
    "function_call",
    "functions",
    "arguments",
    "chat_template_kwargs",
)
STORED_MEDIUM = {"bytes", "path"}  # keys of the object in which `datasets` keeps an image, a sound or a video
PLAIN = {"role", "content", "from", "value"}  # fields of an ordinary message
WEIGHTS = ("weight", "loss_weight", "train", "trainable", "loss", "loss_mask", "mask")
AMBIGUOUS = "mask"  # libraries mean opposite things by its values
FULL_WEIGHT = (1, "1", "1.0", "true", "True")

# columns that no format reads, by the end of the note on them
THOUGHTS_COLUMN = "thoughts are read as `reasoning_content` of a message"
WEIGHT_COLUMN = "each row counts the same"
UNREAD = {
    **{
        f"{side}{name}": THOUGHTS_COLUMN
        for side in ("", "chosen_", "rejected_")
        for name in ("reasoning_content", "reasoning", "thinking")
        if side or name != "reasoning"  # a column `reasoning` is often a judge's
    },
    **dict.fromkeys(
        ("weight", "weights", "loss_weight", "sample_weight", "chosen_weight", "rejected_weight"),
        WEIGHT_COLUMN,
    ),
    **dict.fromkeys(("documents", "enable_thinking"), "templates read it from `chat_template_kwargs`"),
    **dict.fromkeys(("available_tools", "tool_definitions"), "name it with `map`, as `tools`"),
}

TURNS_AFTER = "the turns after its answer are left out"


def row_notes(
    row: Mapping[str, Any],
    parts: Sequence[str | Sequence[Mapping[str, Any]]],
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Notes on what a row holds that is not scored.

    `row` is as it was read; `parts` are the prompt and answers that it makes, as text or messages; `columns`
    are the media of columns, if their types show them.
    """
    messages = [part for part in parts if not isinstance(part, str)]
    texts = [part for part in parts if isinstance(part, str)]
    texts += [message["content"] for part in messages for message in part]
    return [*media_notes(row, texts, columns), *weight_notes(messages[1:]), *column_notes(row)]


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


def media_notes(
    row: Mapping[str, Any], texts: Sequence[str] = (), columns: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """A note for each medium that a row holds, and for marks of a medium in the texts that are scored.

    Media are in columns, in members of messages, or in content parts; those in `columns` are known.
    """
    held = {medium for name, value in row.items() if name not in columns for medium in _media_in(name, value)}
    held |= {medium for name, medium in columns.items() if is_filled(row.get(name))}
    marked = {medium for text in texts if "<" in text or "[IMG" in text for medium in _marks_in(text)}
    return [
        *(f"its {noun} are left out, because only text is scored".replace("audio are", "audio is")
          for medium, noun in NOUNS.items() if medium in held),
        *(f"its text has marks in place of {noun}, which are scored as text"
          for medium, noun in NOUNS.items() if medium in marked),
    ]  # fmt: skip


def differing_media(one: Any, other: Any) -> str | None:
    """The medium in which two answers of a row differ as they were read, for example `images`."""
    media = {*_media_in("", one), *_media_in("", other)} if one != other else ()
    return ", ".join(noun for medium, noun in NOUNS.items() if medium in media) or None


def weight_notes(answers: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """A note for each field that gives messages of the answers less than full weight in the loss."""
    messages = [message for answer in answers for message in answer]
    return [
        f"the `{name}` of its messages is not used: each token of an answer is scored"
        for name in WEIGHTS
        if any(_has_less_weight(name, message.get(name)) for message in messages)
    ]


def column_notes(row: Mapping[str, Any]) -> list[str]:
    """A note for each column that has a meaning for some trainers, but that no format reads."""
    return [
        f"its column `{name}` is not used: {UNREAD[name]}"
        for name in row
        if name in UNREAD
        and row[name] != ""
        and not is_null(row[name])
        and not (UNREAD[name] is WEIGHT_COLUMN and row[name] in FULL_WEIGHT)
    ]


def without_turns_after(answers: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The answers, each up to its last message from the assistant, and a note if that cuts one.

    Answers that are text, or have no message from the assistant, are not cut.
    """
    ended = tuple(answer if isinstance(answer, str) else _up_to_assistant(answer) for answer in answers)
    return ended, () if ended == answers else (TURNS_AFTER,)


def is_filled(value: Any) -> bool:
    """Return whether a field holds anything: no null, NaN, false or empty text, and no container of only
    these.
    """
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
        elif value.keys() == STORED_MEDIUM and is_filled(value):
            yield _medium_of_file(value["path"])
        is_result = isinstance(value.get("role"), str) and standard_role(value["role"]) == "tool"
        for key, member in value.items():
            if not (is_result and key == "content" and _is_data(member)):
                yield from _media_in(key, member)


def _is_data(content: Any) -> bool:
    """Return whether the result of a tool is written as JSON: objects that are no content parts."""
    parts = content if isinstance(content, list) else [content]
    return any(isinstance(part, Mapping) and not part.get("type") for part in parts)


def _medium_of_file(path: Any) -> str:
    """The medium by the end of a file's name; `file` if the name leaves it open."""
    kind = mimetypes.guess_type(path)[0] if isinstance(path, str) else None
    medium = (kind or "").partition("/")[0]
    return medium if medium in NOUNS else "file"


def _marks_in(text: str) -> Iterator[str]:
    if "[IMG]" in text:
        yield "image"
    for mark in MARK.finditer(text):
        word = mark[1].lower()
        if word not in ("video", "audio") or f"</{word}>" not in text.lower():  # else an element of HTML
            yield MEDIUM_OF_MARK.get(word, word)


def _has_less_weight(name: str, value: Any) -> bool:
    return value is not None and (name == AMBIGUOUS or value not in FULL_WEIGHT)
