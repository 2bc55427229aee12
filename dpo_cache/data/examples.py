"""Rows of every format -> one shape: a prompt, its answers, and which answer is preferred to which.

`formats.py` lists the formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpo_cache.data import two_sides
from dpo_cache.data.compared import parse_compared
from dpo_cache.data.lost import without_turns_after
from dpo_cache.data.messages import BadRow, describe
from dpo_cache.data.parsed import Answers, Content, Pairs, Parsed, shared_prefix
from dpo_cache.data.prompt_end import end_prompt
from dpo_cache.data.ranked import parse_completions, parse_ranked

__all__ = ["Example", "RowProblem", "parse_row", "shared_prefix"]


@dataclass(frozen=True)
class Example:
    """One row: a prompt and its answers, all text or all messages, and the pairs among the answers."""

    prompt: Content
    answers: Answers
    pairs: Pairs = ((0, 1),)  # none if all answers rank alike
    template_options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the chat template
    notes: tuple[str, ...] = ()  # what happened to the row and is worth a remark, such as what it lost

    @property
    def is_text(self) -> bool:
        """Whether the tokenizer gets the text as it is, not rendered by the chat template."""
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
        parsed = _parse(row, data_format, ranked_pairs)
        spoken, cut = without_turns_after(parsed.answers)
        prompt, answers, notes = end_prompt(parsed.prompt, spoken, parsed.columns)
        given = row if parsed.tools is None else {**row, "tools": parsed.tools}
        options = {} if isinstance(prompt, str) else _template_options(given)
    except BadRow as problem:
        return RowProblem(str(problem))
    for column, content in (("prompt", prompt), *zip(parsed.columns, answers, strict=True)):
        if not content:
            return RowProblem(f"`{column}` is empty")
    return Example(prompt, answers, parsed.pairs, options, parsed.notes + cut + notes)


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


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the chat template from the columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise BadRow("`tools` is not JSON") from error
    extra = row.get("chat_template_kwargs") or {}
    if not isinstance(extra, dict):
        raise BadRow(f"`chat_template_kwargs` is {describe(extra)}, expected an object")
    return {**({"tools": tools} if tools else {}), **extra}
