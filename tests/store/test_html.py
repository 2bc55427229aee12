"""Caches and pair sets in notebooks."""

from pathlib import Path

import pytest

from dpo_cache.store import Cache, open_cache
from dpo_cache.store.html import ENTRIES, FIRST_PAIRS
from tests.notebook.test_html import HOSTILE, Texts
from tests.store.caches import SOURCE, add_pairs, add_reference
from tests.store.conftest import flip_file

NUMBERS = [(number, number + 20) for number in range(FIRST_PAIRS + 2)]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return open_cache(tmp_path / "cache", create=True)


def texts(value: object) -> list[str]:
    return Texts(value._repr_html_()).texts  # type: ignore[attr-defined]


def test_a_cache_shows_its_pair_sets_and_references(cache: Cache) -> None:
    reference = add_reference(cache)
    add_pairs(cache, reference, NUMBERS)
    shown = texts(cache)
    assert f"Cache {cache}" in shown
    for word in ("demo/train", "7", reference[:12], "example/pairs", "example/tiny", "float32"):
        assert word in shown


def test_an_empty_cache_shows_that_it_is_empty(tmp_path: Path, cache: Cache) -> None:
    assert {"No pair sets.", "No references."} <= set(texts(cache))


def test_a_cache_of_many_pair_sets_shows_some(cache: Cache) -> None:
    reference = add_reference(cache)
    for number in range(ENTRIES + 3):
        add_pairs(cache, reference, NUMBERS[:1], name=f"set-{number}")
    shown = texts(cache)
    assert "… and 3 other pair sets" in shown
    assert sum(text.startswith("set-") for text in shown) == ENTRIES


def test_damage_is_shown_in_its_place_and_the_rest_all_the_same(cache: Cache) -> None:
    reference = add_reference(cache)
    add_pairs(cache, reference, NUMBERS, name="bad")
    add_pairs(cache, reference, NUMBERS, name="good")
    flip_file(Path(str(cache)) / "pairs/bad/train/manifest.json", 20)
    flip_file(Path(str(cache)) / f"references/{reference}/reference.json", 20)
    shown = texts(cache)
    assert {"bad/train", "good/train", "example/pairs"} <= set(shown)
    assert sum("manifest.json" in text for text in shown) == 1
    assert sum("reference.json" in text for text in shown) == 1
    assert any("reference.json" in text for text in texts(cache.pairs("good")))


def test_a_pair_set_shows_its_first_pairs(cache: Cache) -> None:
    reference = add_reference(cache)
    add_pairs(cache, reference, NUMBERS)
    pairs = cache.pairs("demo")
    shown = texts(pairs)
    for word in ("Pair set demo/train", "7", reference[:12], "example/tiny, float32", "one for each token"):
        assert word in shown
    for scored in pairs[:FIRST_PAIRS]:
        assert f"{scored.ref_chosen.logps:,.2f}" in shown
        assert str(len(scored.pair.rejected.completion_ids)) in shown
    assert f"The first {FIRST_PAIRS} pairs; " in shown[-1]
    rows = [attributes for tag, attributes in Texts(pairs._repr_html_()).tags if tag == "tr"]
    assert len(rows) == 7 + 1 + FIRST_PAIRS  # facts, titles, pairs


def test_a_pair_set_whose_pairs_are_damaged_shows_why(cache: Cache) -> None:
    add_pairs(cache, add_reference(cache), NUMBERS)
    (part,) = (Path(str(cache)) / "pairs/demo/train").glob("*.parquet")
    flip_file(part, 100)
    shown = texts(cache.pairs("demo"))
    assert "Pair set demo/train" in shown and part.name in shown[-1]


def test_an_imported_pair_set_says_so(cache: Cache) -> None:
    add_pairs(cache, add_reference(cache), NUMBERS, imported=True)
    assert "imported, one for each token" in texts(cache.pairs("demo"))


def test_names_from_other_people_are_escaped(cache: Cache) -> None:
    def tags(value: object) -> list:
        return Texts(value._repr_html_()).tags  # type: ignore[attr-defined]

    provenance = {"model": HOSTILE, "revision": None, "device": "cpu"}
    plain, hostile = (add_reference(cache, "a"), add_reference(cache, "b", provenance=provenance))
    add_pairs(cache, plain, NUMBERS, name="plain")
    add_pairs(cache, hostile, NUMBERS, name="other", source={**SOURCE, "dataset": HOSTILE})
    assert tags(cache.pairs("other")) == tags(cache.pairs("plain"))
    page = cache._repr_html_()
    assert "&lt;script&gt;" in page and "<script" not in page and "\x1b" not in page
