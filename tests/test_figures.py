"""Figures of README.md are those of the pages that it links, and what fits a card is what `plan` predicts."""

import re
from pathlib import Path

import pytest

import dpo_cache
from benchmarks.what_fits import SHAPES, WAYS, row, write_config

ROOT = Path(dpo_cache.__file__).parents[1]
README, MEASURED, MEMORY = (
    (ROOT / name).read_text() for name in ("README.md", "docs/measurements.md", "docs/memory.md")
)


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its first two lines."""
    lines = text[text.index(f"\n## {heading}\n") :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next(number for number, line in enumerate(lines) if number > start and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : end]]


def test_what_was_measured_is_in_the_measurements() -> None:
    sections = re.split(r"^## ", MEASURED, flags=re.M)
    compared = "".join(
        section for section in sections if "compared with TRL 1.16 and with the limit" in section[:80]
    )
    for name, *values in table(README, "Compared with TRL"):
        for value in values:
            number = re.match(r"[\d.]+", value)
            assert number and re.search(rf"(?<![\d.]){re.escape(number[0])}(?![\d.])", compared), (
                f"{name}: {value}"
            )


def test_what_fits_is_that_of_the_page_on_memory() -> None:
    page = {(model, way): cells for model, way, *cells in table(MEMORY, "What fits on my card")}
    assert set(page) == {(model, way) for model in SHAPES for way in WAYS}
    for model, way, *cells in table(README, "What fits on your GPU"):
        *fitting, _card_of_80, live = page[model, way]
        assert cells == [*fitting, live]


@pytest.mark.rotating(16)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SHAPES)
def test_what_fits_is_what_the_plan_says(size: str, way: str, tmp_path: Path) -> None:
    write_config(tmp_path, size)
    planned = row(size, way, str(tmp_path), {**WAYS[way], "ram": "256GiB"})
    assert planned in MEMORY.splitlines()
