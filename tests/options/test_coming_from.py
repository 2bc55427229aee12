"""The pages for users of other projects name every option there, and only options that exist here."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.cli.app import COMMANDS
from dpo_cache.losses.table import LOSSES
from dpo_cache.losses.terms import SETTINGS
from dpo_cache.options.base import flag_of
from dpo_cache.options.precompute import PrecomputeOptions
from dpo_cache.options.train import TrainOptions
from tests.options.other_projects import OPEN_INSTRUCT, ORIGINAL

DOCS = Path(dpo_cache.__file__).parents[1] / "docs"
PAGES = {"coming-from-original.md": ORIGINAL.split(), "coming-from-open-instruct.md": OPEN_INSTRUCT.split()}
FLAGS = {
    "precompute": {flag_of(entry) for entry in fields(PrecomputeOptions)},
    "train": {flag_of(entry) for entry in fields(TrainOptions)},
}


def table_of(page: str) -> list[list[str]]:
    """The rows of the table of options: three cells each."""
    text = (DOCS / page).read_text().split("<!-- options: begin -->")[1].split("<!-- options: end -->")[0]
    rows = [line.strip("|").split("|") for line in text.strip().splitlines()[2:]]
    assert all(len(row) == 3 for row in rows)
    return [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("page", PAGES)
def test_each_option_there_is_in_one_row(page: str) -> None:
    named = [name for row in table_of(page) for name in re.findall(r"`([\w.]+)`", row[0])]
    assert sorted(named) == sorted(PAGES[page])


@pytest.mark.parametrize("page", PAGES)
def test_each_option_here_exists(page: str) -> None:
    for _, here, reason in table_of(page):
        assert here == "none" or re.fullmatch(r"`(precompute ?)?(--[a-z0-9-]+( [\w=,-]+)?)?`", here), here
        assert reason or here != "none"
        command = "precompute" if here.startswith("`precompute") else "train"
        for flag in re.findall(r"--[a-z0-9-]+", here):
            assert flag in FLAGS[command], flag


@pytest.mark.parametrize("page", [*PAGES, "coming-from-trl.md"])
def test_each_flag_of_the_page_exists(page: str) -> None:
    """All flags in code within sentences, but for a few of the other project."""
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(), flags=re.S)
    elsewhere = {"--loss_type", "--mixer_list", "--config", "--verbose"}
    known = FLAGS["precompute"] | FLAGS["train"] | elsewhere | {"--no-shuffle"}
    for code in re.findall(r"`([^`]+)`", text):
        for flag in re.findall(r"(?<![\w-])--[a-z0-9_-]+", code):
            assert flag in known, f"{page}: {code}"


def test_losses_of_the_pages_exist() -> None:
    for page, names in (("coming-from-original.md", 3), ("coming-from-open-instruct.md", 3)):
        (row,) = [row for row in table_of(page) if row[1] == "`--loss`"]
        assert len({*re.findall(r"`(\w+)`", row[2])} & set(LOSSES)) == names
    assert "simpo_gamma" in SETTINGS and {"precompute", "train"} <= set(COMMANDS)
