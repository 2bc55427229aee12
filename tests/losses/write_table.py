"""Writes the tables of docs/losses.md from the table of losses: `python -m tests.losses.write_table`.

A table is renewed between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import dpo_cache
from dpo_cache.losses.entry import Loss, Paper
from dpo_cache.losses.table import LOSSES, TRL, LossSettings
from dpo_cache.losses.terms import SETTINGS, losses_served_by

PAGE = Path(dpo_cache.__file__).parents[1] / "docs" / "losses.md"


def losses_table() -> list[str]:
    """A row for each loss."""
    rows = [_loss_row(loss) for loss in LOSSES.values()]
    head = ["`--loss`", "per pair", "reference", "takes", TRL, "elsewhere", "paper"]
    return _table(head, rows)


def settings_table() -> list[str]:
    """A row for each setting."""
    rows = []
    for entry in fields(LossSettings):
        served = losses_served_by(entry.name)
        left_out = [name for name, loss in LOSSES.items() if name not in served and loss.prefers]
        shown = ", ".join(f"`{name}`" for name in served) if left_out else "all but `sft`, `sft_norm`"
        paper = SETTINGS[entry.name].metadata["paper"]
        flag = "--" + entry.name.replace("_", "-")
        default = {"None": "none", "True": "on", "False": "off"}.get(str(entry.default), f"`{entry.default}`")
        rows.append([f"`{flag}`", default, shown, _cited(paper, "") if paper else ""])
    return _table(["setting", "default", "losses", "paper"], rows)


def with_tables(page: str) -> str:
    """The page with its tables renewed. Raises `ValueError` where a place for one is missing."""
    for name, lines in (("losses", losses_table()), ("settings", settings_table())):
        block = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        text = "\n".join(lines)
        page, found = block.subn(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
        if found != 1:
            raise ValueError(f"docs/losses.md: expected one block `<!-- {name}: begin -->`, found {found}")
    return page


def _loss_row(loss: Loss) -> list[str]:
    elsewhere = [f"{system}: {name}" for system, name in loss.elsewhere.items() if system != TRL]
    papers = [_cited(loss.paper, loss.equation)] if loss.paper else []
    papers += [
        f"`--{setting.replace('_', '-')}`: {_cited(paper, equation)}"
        for setting, (paper, equation) in loss.papers.items()
    ]
    return [
        f"`{loss.name}`",
        loss.formula,
        "yes" if loss.has_reference else "no",
        "averages" if loss.per_token else "sums",
        loss.elsewhere.get(TRL, "none"),
        "; ".join(elsewhere),
        "; ".join(papers),
    ]


def _cited(paper: Paper, equation: str) -> str:
    number = paper.url.rpartition("/")[2].removesuffix(".pdf")
    link = (
        f"{paper.name}, [{number}]({paper.url})" if "arxiv" in paper.url else f"[{paper.name}]({paper.url})"
    )
    return f"{link} {equation}".strip()


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *escaped)]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
