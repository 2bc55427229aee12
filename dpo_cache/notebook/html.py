"""HTML for `_repr_html_`, by which Jupyter shows the last value of a cell.

    card("Run demo", facts([("steps", "17")]), table(["step", "loss"], [["1", "0.69"]]))

Everything that is shown may come from a file that another person made. So each function escapes its texts;
only `card` and `folded` take HTML, which the other functions made. Colors are those of the page or
translucent greys, which suit light and dark themes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from dpo_cache.errors import printable, printable_lines

NUMBER = re.compile(r"[+-]?[\d,.]+( ?(%|[kMGT]?B|s|h|min|nats)|/[\d,?]+)?( \d+ (s|min))?|-|")
# GitHub, and notebooks that are not trusted, leave styles out: then the page's own style is used. The class
# is doubled to take precedence over Jupyter's style of tables.
SCOPE = "div.dpo-cache.dpo-cache"
STYLE = (
    "<style>"
    f"{SCOPE}{{line-height:1.4;margin:.3em 0}}"
    f"{SCOPE} .wide{{overflow-x:auto}}"
    f"{SCOPE} table{{border:0;border-collapse:collapse;margin:.3em 0;font-size:.95em}}"
    f"{SCOPE} th,{SCOPE} td{{text-align:left;vertical-align:top;padding:.15em .8em;"
    "border:0;border-bottom:1px solid rgba(128,128,128,.3)}"
    f"{SCOPE} .facts th{{font-weight:normal}}"
    f"{SCOPE} .facts td{{overflow-wrap:anywhere}}"
    f"{SCOPE} .number{{text-align:right;font-variant-numeric:tabular-nums}}"
    f"{SCOPE} .faint{{opacity:.75}}"
    f"{SCOPE} .note{{font-size:.9em;white-space:pre-wrap;margin:.2em 0}}"
    f"{SCOPE} .detail{{white-space:pre-wrap}}"
    f"{SCOPE} .bar{{display:inline-block;vertical-align:middle;width:16em;max-width:40%;height:.5em;"
    "margin-right:.8em;border-radius:.25em;overflow:hidden;background:rgba(128,128,128,.3)}"
    f"{SCOPE} .bar>span{{display:block;height:100%;background:#2f81f7}}"
    "</style>"
)


def card(title: str, *parts: str) -> str:
    """A title above parts, which are HTML."""
    return f'{STYLE}<div class="dpo-cache"><div><b>{text(title)}</b></div>{"".join(parts)}</div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values; rows without a value are left out."""
    lines = [
        f'<tr><th class="faint">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows if value
    ]
    return f'<table class="facts">{"".join(lines)}</table>' if lines else ""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a line of titles; columns of numbers are aligned to the right."""
    columns = zip(*rows, strict=True) if rows else ((),) * len(titles)
    kinds = [' class="number"' if all(map(NUMBER.fullmatch, column)) else "" for column in columns]

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = (f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{line("th", titles)}</thead><tbody>{body}</tbody></table></div>'


def note(line: str) -> str:
    """A paragraph in small type; its line breaks stay."""
    return f'<div class="note faint">{escape(printable_lines(line))}</div>'


def folded(summary: str, *parts: str) -> str:
    """Parts, which are HTML, that a click on the summary shows."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


def remarks(lines: Sequence[str]) -> str:
    """The remarks of a report, which a click shows; nothing without any."""
    if not lines:
        return ""
    return folded(f"{len(lines)} remark{'' if len(lines) == 1 else 's'}", *map(note, lines))


def bar(share: float, detail: str) -> str:
    """A progress bar, filled from 0 to 1, and a text."""
    percent = f"{100 * min(max(share, 0.0), 1.0):.1f}"
    filled = f'<span role="progressbar" aria-valuenow="{percent}" style="width:{percent}%"></span>'
    return f'<div><span class="bar">{filled}</span><span class="detail">{text(detail)}</span></div>'


def text(value: object) -> str:
    """The value on one line: HTML and control characters are escaped."""
    return escape(printable(value))
