"""Untrusted text as Markdown that only shows it: no HTML and no links take effect."""

from __future__ import annotations

import re

from dpo_cache.errors import printable

FENCE = re.compile("`+")
PUNCTUATION = re.compile(r"([!-+./:-@\[-`{}~])")  # ASCII punctuation except , - and |


def code(text: object) -> str:
    """The text as a code span, in which no markup takes effect; also for a cell of a table."""
    shown = _on_one_line(text)
    longest = max(map(len, FENCE.findall(shown)), default=0)
    if not longest:
        return f"`{shown}`"
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}"


def plain(text: object) -> str:
    """The text for use between other words, with all characters of Markdown and HTML markup escaped."""
    return PUNCTUATION.sub(r"\\\1", _on_one_line(text))


def _on_one_line(text: object) -> str:
    """The text without line breaks, and without the bar that ends a cell of a table."""
    return printable(text).replace("|", "\\x7c") or "-"
