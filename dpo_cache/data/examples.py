"""Rows of every format -> one shape: a prompt, its answers, and which answer is preferred to which.

`formats.py` lists the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dpo_cache.data import two_sides
from dpo_cache.data.columns import DIALOGUES, PROMPTS
from dpo_cache.data.compared import parse_compared
from dpo_cache.data.fields import BadRow, describe, is_null
from dpo_cache.data.lost import without_turns_after
from dpo_cache.data.messages import Message
from dpo_cache.data.parsed import Answers, Content, Pairs, Parsed, shared_prefix
from dpo_cache.data.prompt_end import end_prompt
from dpo_cache.data.prompts import with_system_column
from dpo_cache.data.ranked import parse_completions, parse_ranked
from dpo_cache.data.serialized import parse_columns, parse_json
from dpo_cache.data.tool_calls import ARGUMENTS_AS_TEXT, has_text_arguments, read_tools, tools_of_functions

__all__ = ["Example", "RowProblem", "parse_row", "shared_prefix"]


@dataclass(frozen=True)
class Example:
    """One row: a prompt and its answers, all text or all messages, and the pairs among the answers."""

    prompt: Content
    answers: Answers
    pairs: Pairs = ((0, 1),)  # none if all answers rank alike
    template_options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the chat template
    notes: tuple[str, ...] = ()  # events of the row that deserve a remark, such as a part that was left out

    @property
    def is_text(self) -> bool:
        """Return whether the tokenizer gets the text as it is, not rendered by the chat template."""
        return isinstance(self.prompt, str)


@dataclass(frozen=True)
class RowProblem:
    """Why a row cannot be used, in words that complete 'row 7: ...'."""

    reason: str


def parse_row(row: dict[str, Any], data_format: str, ranked_pairs: str = "all") -> Example | RowProblem:
    """The row's example, or the problem with the row.

    `ranked_pairs`: pair each of the ranked answers with each lower one (all), or only the best (best).
    """
    try:
        row, read_as_text = parse_columns(with_system_column(row), is_text=data_format == "text")
        parsed = _parse(row, data_format, ranked_pairs)
        spoken, cut = without_turns_after(parsed.answers)
        prompt, answers, notes = end_prompt(parsed.prompt, spoken, parsed.columns)
        options = {} if isinstance(prompt, str) else _template_options(row, parsed.tools)
    except BadRow as problem:
        return RowProblem(str(problem))
    call_notes = () if isinstance(prompt, str) else _call_notes((prompt, *answers))
    for column, content in (("prompt", prompt), *zip(parsed.columns, answers, strict=True)):
        if not content:
            return RowProblem(_empty_prompt(row) if column == "prompt" else f"`{column}` is empty")
        if column != "prompt" and not (isinstance(content, str) or _has_assistant(content)):
            return RowProblem(f"`{column}` has no message from the assistant")
    return Example(
        prompt, answers, parsed.pairs, options, parsed.notes + cut + notes + read_as_text + call_notes
    )


def _empty_prompt(row: dict[str, Any]) -> str:
    """Why a row has no prompt: `messages` may be text that is no messages, so another format reads it."""
    names = ("conversations", *DIALOGUES)
    text = next((name for name in names if isinstance(row.get(name), str) and row[name].strip()), None)
    if row.get("prompt") is not None or text is None:
        return "`prompt` is empty"
    return f"`{text}` is text, not messages as JSON, and the answers have no common start as their prompt"


def _has_assistant(messages: list[Message]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _parse(row: dict[str, Any], data_format: str, ranked_pairs: str) -> Parsed:
    if data_format in RANKED_PARSERS:
        return RANKED_PARSERS[data_format](row, ranked_pairs)
    return PARSERS[data_format](row)


PARSERS: dict[str, Callable[[dict[str, Any]], Parsed]] = {
    "text": two_sides.parse_text,
    "conversation": two_sides.parse_conversation,
    "implicit": two_sides.parse_implicit,
    "sharegpt": two_sides.parse_sharegpt,
    "alpaca": two_sides.parse_alpaca,
    "question": two_sides.parse_question,
    "messages": two_sides.parse_messages,
    "swift": two_sides.parse_swift,
    "openai": two_sides.parse_openai,
    "output": two_sides.parse_output,
    "compared": parse_compared,
}
RANKED_PARSERS: dict[str, Callable[[dict[str, Any], str], Parsed]] = {
    "ranked": parse_ranked,
    "completions": parse_completions,
}


def _template_options(row: dict[str, Any], tools: Any) -> dict[str, Any]:
    """Keyword arguments of the chat template: the tools given, or those of the row, and the column
    `chat_template_kwargs`.
    """
    tools = read_tools(_find_tools(row) if tools is None else tools)
    extra = row.get("chat_template_kwargs")
    if isinstance(extra, str) and isinstance(parsed := parse_json(extra), dict):
        extra = parsed
    extra = {} if is_null(extra) or extra == "" else extra
    if not isinstance(extra, dict):
        raise BadRow(f"`chat_template_kwargs` is {describe(extra)}, expected an object")
    return {**({"tools": tools} if tools else {}), **extra}


def _find_tools(row: dict[str, Any]) -> Any:
    """The column `tools`, `tools` next to the messages of a prompt that is an object, or the column
    `functions`.
    """
    if row.get("tools"):
        return row["tools"]
    prompts = (row.get(name) for name in PROMPTS)
    found = next(
        (value["tools"] for value in prompts if isinstance(value, dict) and value.get("tools")), None
    )
    return found or tools_of_functions(row.get("functions"))


def _call_notes(contents: Iterable[Content]) -> tuple[str, ...]:
    messages = (message for content in contents for message in content if isinstance(message, dict))
    has_text = any(
        has_text_arguments(message["tool_calls"]) for message in messages if "tool_calls" in message
    )
    return (ARGUMENTS_AS_TEXT,) if has_text else ()
