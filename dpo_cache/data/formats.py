"""The format of preference data, recognised from its columns and the types in a row (see `deciding.py`).

    sharegpt       conversations (from, value); chosen, rejected: strings or turns; system: optional. A turn
                   from function_call is JSON, {"name": ..., "arguments": ...} or a list of these; one from
                   observation or tool is its result
    text           prompt, chosen, rejected: strings
    conversation   prompt: string or messages; chosen, rejected: messages, with or without the prompt
                   repeated; system: optional
    alpaca         instruction, input (may be missing or empty); chosen, rejected; system, history: optional
    openai         input: {"messages": ..., "tools": ...}; preferred_output, non_preferred_output: messages
    question       question (or query, problem, user_prompt, user_input, input); chosen, rejected; system,
                   history: optional
    messages       messages (or prompt_messages, context), to be answered; chosen, rejected; system: optional
    implicit       chosen, rejected: whole dialogues, as messages or text; the prompt is what they share
    swift          messages (or conversations), of which the last is the chosen answer; rejected_response:
                   string, or rejected_messages: the other dialogue; system: optional
    output         a prompt; output: a list of two, the chosen answer and the rejected one
    completions    a prompt; completions: a list of objects, each with an answer and its rank (the lower the
                   better) or score (the higher the better)
    ranked         a prompt; responses: a list of answers; scores (higher is better) or ranks (1 is best)
    compared       a prompt, or whole dialogues; two answers, such as response_a and response_b; the better
                   one in a column such as preference, better_response_id, winner

Formats are tried in this order; `columns.py` lists other names of their columns. "A prompt" is the first of
conversations, prompt, messages, prompt_messages, context, instruction (with input), question, query, problem,
user_prompt, user_input, input, history. An answer is a string or messages. `chosen` and
`rejected` may be lists of several answers; then each chosen answer makes a pair with each rejected one.

Messages are `{"role": ..., "content": ...}`. A prompt in `prompt` and answers that are all strings are text.
All other rows are rendered by the chat template, which also gets a column `tools` (a list, or JSON) and a
column `chat_template_kwargs` (an object).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cache.data.columns import (
    ANSWERED,
    DIALOGUES,
    LISTS,
    PROMPTS,
    QUESTIONS,
    RANKS,
    RESPONSES,
    SCORES,
    SIDES,
    SYSTEMS,
    find_first,
    find_sides,
)
from dpo_cache.data.compared import find_pair, find_verdict, has_verdict
from dpo_cache.data.examples import RANKED_PARSERS, Example, parse_row
from dpo_cache.data.fields import is_blank
from dpo_cache.data.prompts import bare_answer, is_several, is_whole_dialogue
from dpo_cache.data.ranked import is_scored
from dpo_cache.data.refusals import refusal
from dpo_cache.data.serialized import with_parsed_columns
from dpo_cache.errors import DataError

Row = dict[str, Any]
Names = tuple[str, ...]  # columns that belong together

PROMPT, SWIFT = tuple((name,) for name in PROMPTS), (("rejected_response",), ("rejected_messages",))
QUESTION, DIALOGUE, LIST = (tuple((name,) for name in names) for names in (QUESTIONS, DIALOGUES, LISTS))
DIALOGUE_ANSWERED = tuple((name,) for name in ANSWERED)
RANKING = tuple((name,) for name in (*SCORES, *RANKS))


@dataclass(frozen=True)
class Format:
    """The rule by which a format is recognised before those after it."""

    columns: tuple[tuple[Names, ...], ...]  # for each part of a row, the columns that may hold it
    fits: Callable[[Row], bool] = bool  # True if the first row has values of the format's types

    def lacks(self, columns: Sequence[str]) -> list[Names]:
        """The parts that none of these columns hold, each by its first names."""
        return [part[0] for part in self.columns if not any(set(names) <= set(columns) for names in part)]


def _is_text(row: Row) -> bool:
    values = (bare_answer(row.get(column)) for column in ("prompt", *find_sides(row)))
    return not any(isinstance(value, (list, dict)) and not is_several(value) for value in values)


def _has_messages_to_answer(row: Row) -> bool:
    column = find_first(row, DIALOGUES)
    is_given = column is not None and isinstance(row[column], (list, dict))
    return is_given and not any(is_whole_dialogue(row.get(side)) for side in find_sides(row))


def _is_answered(row: Row) -> bool:
    return isinstance(row.get(find_first(row, ANSWERED) or ""), (list, dict))


def _first_list(row: Row) -> Any:
    return row.get(find_first(row, LISTS) or LISTS[0])


FORMATS = {
    "sharegpt": Format(((("conversations",),), SIDES)),
    "text": Format(((("prompt",),), SIDES), _is_text),
    "conversation": Format(((("prompt",),), SIDES)),
    "alpaca": Format(((("instruction",),), SIDES)),
    "openai": Format(
        ((("input",),), (("preferred_output", "non_preferred_output"),)),
        lambda row: isinstance(row.get("input"), (dict, list)),
    ),
    "question": Format((QUESTION, SIDES)),
    "messages": Format((DIALOGUE, SIDES), _has_messages_to_answer),
    "implicit": Format((SIDES,)),
    "swift": Format((DIALOGUE_ANSWERED, SWIFT), _is_answered),
    "output": Format((PROMPT, (("output",),)), lambda row: isinstance(row.get("output"), list)),
    "completions": Format((LIST,), lambda row: is_scored(_first_list(row))),
    "ranked": Format((PROMPT, LIST, RANKING), lambda row: isinstance(_first_list(row), list)),
    "compared": Format(((*RESPONSES, *LIST),), has_verdict),
}
RANKED = tuple(RANKED_PARSERS)  # formats whose rows may make several pairs, by merit

# Columns that not every format reads, with values that change a row wherever they are read
EMPTY: tuple[Any, ...] = ([], {}, "[]", "{}", "null")
OPTIONAL: Row = {
    "system": "-",
    "history": [["-", "-"]],
    "input": "-",
    "context": "-",
    "tools": [{"type": "function", "function": {"name": "-", "parameters": {}}}],
    "chat_template_kwargs": {"-": "-"},
    **dict.fromkeys(SYSTEMS, "-"),
    **dict.fromkeys(("prompt", "instruction", *(name for name in QUESTIONS if name != "input")), "-"),
    **{name: [] for name in DIALOGUES if name != "context"},
}


def detect_format(columns: Sequence[str], first_row: Row, place: str = "the data") -> str:
    """The format's name. Raises `DataError` naming the columns found and those accepted."""
    row = with_parsed_columns({**dict.fromkeys(columns), **first_row})
    for name, data_format in FORMATS.items():
        if not data_format.lacks(columns) and data_format.fits(row):
            return name
    raise refusal(columns, row, place)


def check_format(name: str, columns: Sequence[str], place: str = "the data") -> str:
    """The format that the user named. Raises `DataError` if a column that it needs is missing."""
    missing = [column for names in FORMATS[name].lacks(columns) for column in names if column not in columns]
    if missing:
        needed = dict.fromkeys(column for part in FORMATS[name].columns for column in part[0])
        raise DataError(
            f"`format` {name} needs the columns {', '.join(needed)}; {place} has no "
            f"{', '.join(missing)}, but {', '.join(columns)}.\n"
            "Name the columns that correspond with `map`, for example `map` prompt=question."
        )
    return name


def has_all_parts(row: Row, columns: Sequence[str]) -> bool:
    """Return whether the row has a value in each part of every format whose columns there are."""
    return all(
        any(not any(is_blank(row.get(name)) for name in names) for names in part)
        for data_format in FORMATS.values()
        if not data_format.lacks(columns)
        for part in data_format.columns
    )


def unused_columns(data_format: str, columns: Sequence[str], first_row: Row) -> list[str]:
    """Columns that change rows of other formats, but not rows like the first: those that a format or a chat
    template may use, and those that could be the prompt but hold something else.
    """
    row = {**dict.fromkeys(columns), **first_row}
    example = parse_row(row, data_format)
    if not isinstance(example, Example):
        return []
    contents = (example.prompt, *example.answers)
    texts = [one if isinstance(one, str) else " ".join(turn["content"] for turn in one) for one in contents]
    return [
        name
        for name, value in OPTIONAL.items()
        if name in columns
        and not _is_used(name, value, row, data_format)
        and not _is_within(row[name], texts)
    ]


def unused_remark(columns: Sequence[str], data_format: str) -> str:
    """A remark on columns that the format does not use."""
    shown = f"the columns {', '.join(columns)} are" if len(columns) > 1 else f"the column {columns[0]} is"
    prompts = [name for name in columns if name in PROMPTS and name != "history"]
    advice = (
        f" If {prompts[0]} is the prompt, name it with `map`: `map` prompt={prompts[0]}." if prompts else ""
    )
    return f"{shown} not used by the format {data_format}.{advice}"


def _is_used(name: str, value: Any, row: Row, data_format: str) -> bool:
    """Return whether the column changes the row, by its own value or, where it has none, by this one."""
    own = row[name]
    given = value if is_blank(own) or own in EMPTY else own
    if name in DIALOGUES and name != "context" and not isinstance(own, list):
        return True  # no prompt
    return parse_row({**row, name: None}, data_format) != parse_row({**row, name: given}, data_format)


def _is_within(value: Any, texts: Sequence[str]) -> bool:
    """Return whether text, or that of each message, is a part of one of these."""
    parts = value if isinstance(value, list) else [value]
    parts = [part.get("content", part.get("value")) if isinstance(part, dict) else part for part in parts]
    return bool(parts) and all(
        isinstance(part, str) and not is_blank(part) and any(part.strip() in text for text in texts)
        for part in parts
    )


def columns_read(data_format: str, columns: Sequence[str], first_row: Row) -> str | None:
    """The reading of columns whose names leave it open: words after 'the data: '."""
    names = tuple(columns)
    others = [
        name for name in names if name not in find_sides(names) and isinstance(first_row.get(name), str)
    ]
    if data_format == "implicit" and others and isinstance(first_row.get(find_sides(names)[0]), str):
        return (
            f"the prompt is the text that the answers share. If it is in {' or '.join(others)}, name it with "
            f"`map`, for example `map` prompt={others[0]}"
        )
    row = {name: first_row.get(name) for name in names}
    if data_format == "compared" and has_verdict(row) and (found := find_pair(row)):
        verdict = " and ".join(f"`{name}`" for name in find_verdict(row, found).columns)
        one, other = found.columns
        shown = f"`{one}` and `{other}`" if one != other else f"the two in `{one}`"
        return f"the better of {shown} is chosen, by {verdict}"
    if SIDES in FORMATS[data_format].columns and (sides := find_sides(names)) != SIDES[0]:
        return f"`{sides[0]}` is read as chosen, `{sides[1]}` as rejected"
    return None
