"""HTML of values: what comes from files is escaped, and numbers are aligned."""

from html.parser import HTMLParser

import pytest

from dpo_cache.notebook import html

HOSTILE = "<script>alert(1)</script>&\"'\x1b[31m\n</td>"


class Texts(HTMLParser):
    """The texts of a page, and its tags with their attributes; raises if tags do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def made_of(text: str) -> list[str]:
    """Each function's HTML of a text."""
    return [
        html.card(text),
        html.facts([(text, text)]),
        html.table([text, "b"], [[text, "1"]]),
        html.note(text),
        html.folded(text),
        html.remarks([text]),
        html.bar(0.5, text),
    ]


def test_texts_are_escaped_wherever_they_are_shown() -> None:
    for plain, hostile in zip(made_of("a"), made_of(HOSTILE), strict=True):
        page = Texts(hostile)
        assert page.tags == Texts(plain).tags  # no tag and no attribute more
        shown = "".join(page.texts)
        assert "<script>alert(1)</script>&\"'\\x1b[31m" in shown and "\x1b" not in shown


def test_a_text_of_one_line_stays_one() -> None:
    assert "".join(Texts(html.text("a\nb")).texts) == "a\\nb"
    assert "a\nb" in "".join(Texts(html.note("a\nb")).texts)


NUMBERS = ("12", "1,234", "+0.0123", "99.5%", "1.25 GB", "3.2 s", "2 min 5 s", "7/20", "7/?", "-", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_columns_of_numbers_are_aligned_to_the_right(number: str) -> None:
    page = Texts(html.table(["name", "value"], [["a", number], ["b", "5"]]))
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag in ("th", "td")]
    assert kinds == [None, "number"] * 3


@pytest.mark.parametrize("word", ["a1", "1 to 10", "12 of 13", "v1.2", "1.2.x"])
def test_columns_with_a_word_are_aligned_to_the_left(word: str) -> None:
    assert "number" not in html.table(["value"], [["5"], [word]])


def test_what_is_empty_is_left_out() -> None:
    assert html.facts([]) == html.facts([("name", "")]) == html.remarks([]) == ""
    assert html.table(["a"], []).count("<tr") == 1


@pytest.mark.parametrize(("share", "value"), [(-0.1, "0.0"), (0.25, "25.0"), (1.5, "100.0")])
def test_a_bar_stays_within_its_ends(share: float, value: str) -> None:
    page = Texts(html.bar(share, "3.0 s left"))
    filled = {"role": "progressbar", "aria-valuenow": value, "style": f"width:{value}%"}
    assert page.tags[2] == ("span", filled) and page.texts == ["3.0 s left"]
