"""Every page runs: see the package's docstring."""

from collections.abc import Iterator

import pytest

from tests.documents.folder import Workplace
from tests.documents.pages import PAGES, Page, workplace


@pytest.fixture(scope="module")
def place() -> Iterator[Workplace]:
    with workplace() as made:
        yield made


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_and_its_output_is_what_it_shows(name: str, place: Workplace) -> None:
    page = Page(name)
    page.run(place)
    assert not page.problems, "\n\n".join(page.problems)
