"""Writes the tables of docs/coming-from-trl.md from `trl_fields.py`: `python -m tests.options.write_trl_tables`.

The tables are between the lines `<!-- fields: begin -->` and `<!-- fields: end -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

import dpo_cache
from dpo_cache.options.trl_fields import MODEL_FIELDS, PARTS, TrlField

PAGE = Path(dpo_cache.__file__).parents[1] / "docs" / "coming-from-trl.md"
BLOCK = re.compile(r"(<!-- fields: begin -->\n).*?(<!-- fields: end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with its tables renewed."""
    parts = {**PARTS, "The model, in files of `trl dpo`": MODEL_FIELDS}
    text = "\n\n".join("\n".join(_table(title, part)) for title, part in parts.items())
    page, found = BLOCK.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)
    assert found == 1
    return page


def _table(title: str, part: dict[str, TrlField]) -> list[str]:
    """Fields with an option first, in the order of the part."""
    rows = sorted(part.items(), key=lambda entry: not entry[1].equal)
    head = [f"### {title}", "", "| TRL | default | `dpo-cache train` | |", "| --- | --- | --- | --- |"]
    return head + [
        f"| `{name}` | {_shown(field.default)} | {_option(field.equal)} | {field.note} |"
        for name, field in rows
    ]


def _option(names: str) -> str:
    return ", ".join(f"`--{name.replace('_', '-')}`" for name in names.split(", ")) if names else "none"


def _shown(value: object) -> str:
    return "" if value is None or value in ("", []) else f"`{value}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
