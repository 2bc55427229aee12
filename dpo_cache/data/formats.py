"""The format of preference data, recognised from its columns and the types in its first row.

    text             prompt, chosen, rejected: strings
    conversation     prompt: string or messages; chosen, rejected: messages, with or without the prompt
                     repeated
    implicit         chosen, rejected: whole dialogues, as messages or text; the prompt is what they share
    sharegpt         conversations (from, value); chosen, rejected: one turn each; system: optional. A turn
                     from function_call is JSON, {"name": ..., "arguments": ...} or a list of these; one from
                     observation or tool is its result
    alpaca           instruction, input (may be missing or empty); chosen, rejected: strings; system, history:
                     optional
    question         question; chosen, rejected: strings; system: optional
    ranked           prompt; responses: a list of strings or of message lists; scores (higher is better) or
                     ranks (1 is best)

Messages are `{"role": ..., "content": ...}`. All rows but text are rendered by the chat template, which also
gets a column `tools` (a list, or JSON) and a column `chat_template_kwargs` (an object).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cache.data.examples import Example, parse_row
from dpo_cache.errors import DataError

# Columns that a format needs, in the order in which formats are tried; text and conversation differ by their
# values.
NEEDED = {
    "sharegpt": ("conversations", "chosen", "rejected"),
    "text": ("prompt", "chosen", "rejected"),
    "conversation": ("prompt", "chosen", "rejected"),
    "alpaca": ("instruction", "chosen", "rejected"),
    "question": ("question", "chosen", "rejected"),
    "implicit": ("chosen", "rejected"),
    "ranked": ("prompt", "responses"),
}

ACCEPTED = """\
  prompt, chosen, rejected                    (text, or messages with role and content)
  chosen, rejected                            (whole dialogues that share the prompt)
  conversations, chosen, rejected             (ShareGPT: from and value)
  instruction, input, chosen, rejected        (Alpaca)
  system, question, chosen, rejected
  prompt, responses, scores or ranks          (ranked answers)"""

OPTIONAL = ("system", "history", "tools", "chat_template_kwargs")


def detect_format(columns: Sequence[str], first_row: dict[str, Any], place: str = "the data") -> str:
    """The format's name. Raises `DataError` naming the columns found and those accepted."""
    name = next((name for name, needed in NEEDED.items() if set(needed) <= set(columns)), None)
    if name is None:
        raise DataError(
            f"{place} is not preference data: found the columns {', '.join(columns) or '(none)'}; accepted "
            f"are\n{ACCEPTED}\n"
            "Name the columns that correspond with `map`, for example `map` prompt=question, or rename them."
        )
    if name == "text" and any(isinstance(first_row[column], list) for column in NEEDED["text"]):
        return "conversation"
    return name


def check_format(name: str, columns: Sequence[str], place: str = "the data") -> str:
    """The format that the user named. Raises `DataError` if a column that it needs is missing."""
    missing = [column for column in NEEDED[name] if column not in columns]
    if missing:
        raise DataError(
            f"`format` {name} needs the columns {', '.join(NEEDED[name])}; {place} has no "
            f"{', '.join(missing)}, but {', '.join(columns)}.\n"
            "Name the columns that correspond with `map`, for example `map` prompt=question."
        )
    return name


def unused_columns(data_format: str, columns: Sequence[str], first_row: dict[str, Any]) -> list[str]:
    """Optional columns that other formats or a chat template use, but not rows like the first."""
    example = parse_row({**dict.fromkeys(columns), **first_row}, data_format)
    is_text = isinstance(example, Example) and example.is_text
    by_format = {"alpaca": ("system", "history"), "implicit": ()}.get(data_format, ("system",))
    used = () if is_text else ("tools", "chat_template_kwargs", *by_format)
    return [name for name in OPTIONAL if name in columns and name not in used]
