"""Figures of docs/negative-results.md are those of the pages that have their commands."""

import re
from pathlib import Path

import pytest

import dpo_cache

DOCS = Path(dpo_cache.__file__).parents[1] / "docs"
FIGURE = re.compile(r"\+?\d[\d,]*\.?\d*(?:e[+-]\d+)?(?: %| MB| GFLOP/s| times| tokens/s)?")


def figures() -> list[str]:
    """Numbers with a point, a unit or more than three digits; others are counts of the text."""
    page = re.sub(r"\(.*?\)|`.*?`|3\.11", "", (DOCS / "negative-results.md").read_text())
    found = {figure.strip(" ,.") for figure in FIGURE.findall(page)}
    return sorted(figure for figure in found if re.search(r"\.|[a-zA-Z%]|\d{4}|,", figure))


@pytest.mark.parametrize("figure", figures())
def test_a_figure_is_that_of_the_measurements(figure: str) -> None:
    number = figure.split(" ")[0]
    text = (DOCS / "measurements.md").read_text() + (DOCS / "training.md").read_text()
    assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d]|\.\d)", text), f"measurements.md has no {figure}"
