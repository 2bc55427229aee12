"""Chat templates that write the day, made to write one day only.

A template gets the day from the function `strftime_now` of transformers. A macro of that name, put before the
template's own text, takes its place. Jinja has no `strftime`, so the macro replaces each directive, such as
`%d`, by its text on that day, at midnight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from transformers import PreTrainedTokenizerBase

CLOCK = "strftime_now"
PERCENT = "\0"  # in place of %% while directives are replaced
LETTERS = "aAbBcCdDeFgGhHIjklmMnpPrRsSTtuUVwWxXyYzZ"
DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in LETTERS]


def writes_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a chat template of the tokenizer depends on the day."""
    return CLOCK in str(tokenizer.chat_template)


def with_template_date(tokenizer: PreTrainedTokenizerBase, day: date | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or, if a chat template of it depends on the day, a copy whose templates write this day.

    None is today.
    """
    if not writes_day(tokenizer):
        return tokenizer
    dated, template, head = copy.copy(tokenizer), tokenizer.chat_template, _clock_macro(day or date.today())
    is_named = isinstance(template, dict)
    dated.chat_template = (
        {name: head + text for name, text in template.items()} if is_named else head + template
    )
    return dated


def template_date_of(manifest: Mapping[str, Any]) -> date | None:
    """The day that a pair set's chat template wrote, from its manifest; None if it did not write the day.

    Manifests made before days were recorded have the day on which they were made.
    """
    made_with = manifest.get("tokenization") or {}
    written = made_with.get("template_date")
    if written is None and CLOCK in str(made_with.get("chat_template")):
        written = str(manifest.get("source", {}).get("created"))[: len("2026-11-28")]
    try:
        return date.fromisoformat(written) if written else None
    except (TypeError, ValueError):
        return None


def _clock_macro(day: date) -> str:
    moment = datetime.combine(day, time())
    steps = [(directive, moment.strftime(directive)) for directive in DIRECTIVES]
    steps = [("%%", PERCENT), *steps, (PERCENT, "%")]
    # Jinja takes a second to compile 80 filters in one expression, and 0.03 s for a statement each.
    replaced = "".join(
        f"{{%- set format = format | replace({name!r}, {text!r}) -%}}" for name, text in steps if name != text
    )
    # The block ends in a line break, which Jinja removes, so that the template begins at the start of a line.
    return f"{{%- macro {CLOCK}(format) -%}}{replaced}{{{{ format }}}}{{%- endmacro %}}\n"
