import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.format.documents import (
    canonical_json,
    digest_json,
    open_sealed,
    parse_document,
    seal_document,
)
from tests.store.conftest import flip

DOCUMENT = {
    "rows": 12,
    "rate": 1e-06,
    "name": "répertoire \u0001",
    "parts": [{"file": "a", "ok": True}, None],
    "nested": {"": -0.5},
}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(text.filter(lambda name: name != "sha256"), values, max_size=4)


@given(documents)
@settings(deadline=None)
def test_what_is_sealed_is_opened_again(document: dict) -> None:
    assert open_sealed(seal_document(document), "there") == document


@given(documents)
@settings(deadline=None)
def test_the_order_of_members_changes_neither_seal_nor_digest(document: dict) -> None:
    turned = dict(reversed(document.items()))
    assert seal_document(turned) == seal_document(document)
    assert digest_json(turned) == digest_json(document)


def test_a_sealed_document_has_one_spelling_on_disk() -> None:
    assert seal_document({"b": [1], "a": "é"}).decode() == (
        '{\n  "a": "é",\n  "b": [\n    1\n  ],\n'
        '  "sha256": "fe44b490e297c0523c2a1ce591fc7b3b064b5ad3f2ac4634523685392680de5d"\n}\n'
    )


def test_the_canonical_spelling_is_sorted_raw_and_without_spaces() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"é": None}}) == '{"a":{"é":null},"b":[1,2.5]}'.encode()


@pytest.mark.parametrize("mask", [0x01, 0x20])
def test_every_flipped_byte_is_refused(mask: int) -> None:
    sealed = seal_document(DOCUMENT)
    for position in range(len(sealed)):
        with pytest.raises(CorruptShardError, match="there: "):
            open_sealed(flip(sealed, position, mask), "there")


def test_every_truncation_is_refused() -> None:
    sealed = seal_document(DOCUMENT)
    for length in range(len(sealed)):
        with pytest.raises(CorruptShardError, match="there: "):
            open_sealed(sealed[:length], "there")


def test_another_spelling_of_the_same_document_is_refused() -> None:
    sealed = seal_document(DOCUMENT)
    for other in (
        json.dumps(json.loads(sealed)).encode(),
        sealed + b"\n",
        sealed.replace("é".encode(), b"\\u00e9"),
        sealed.decode().encode("utf-16"),
    ):
        with pytest.raises(CorruptShardError):
            open_sealed(other, "there")


def test_a_document_without_a_seal_is_refused() -> None:
    with pytest.raises(CorruptShardError) as caught:
        open_sealed(b'{"rows": 12}', "there")
    assert str(caught.value) == (
        "there: its content does not match its own digest.\n"
        "The file was changed or damaged. Delete it and run the `dpo-cache precompute` that made it again."
    )


@pytest.mark.parametrize("content", [b"", b"[1]", b"7", b'"a"', b"null", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptShardError, match="there: "):
        parse_document(content, "there")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', '{"\\udfff": 1}'])
def test_values_that_have_no_canonical_spelling_are_refused(value: str) -> None:
    with pytest.raises(CorruptShardError):
        open_sealed(f'{{"rate": {value}, "sha256": "0"}}'.encode(), "there")


def test_a_flipped_bit_that_makes_a_number_infinite_is_refused() -> None:
    sealed = seal_document({"rate": 1e300})
    with pytest.raises(CorruptShardError):
        open_sealed(flip(sealed, sealed.index(b"1e+300") + 4), "there")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_not_sealed(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        seal_document({"rate": value})
