import pytest

from dpo_cache.errors import first_line, kind_of, shown_bytes, shown_rows


def test_rows_are_shown_with_their_first_few() -> None:
    assert shown_rows([3]) == "3"
    assert shown_rows(list(range(8))) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert shown_rows(list(range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, …"
    assert shown_rows([1, 2, 4], most=2) == "1, 2, …"
    assert shown_rows([1, 2], count=2) == "1, 2" and shown_rows([1, 2], count=3) == "1, 2, …"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo", "one"),
        ("\n  one  \ntwo", "one"),
        ("", "ValueError"),
        ("Validation error for field 'n':\n    TypeError: expected int\nmore", "Validation error for field 'n': "
         "TypeError: expected int"),
        ("Error(s) in loading:\n\n\tof Llama:\n\tsize mismatch for a", "Error(s) in loading: of Llama: size "
         "mismatch for a"),
        ("nothing follows:", "nothing follows:"),
    ],
)  # fmt: skip
def test_the_first_line_of_an_error_has_what_it_announces(text: str, expected: str) -> None:
    assert first_line(ValueError(text)) == expected


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"), (999, "999 B"), (999.7, "1.0 kB"), (1000, "1.0 kB"), (12_345, "12.3 kB"), (999_949, "999.9 kB"),
        (999_950, "1.0 MB"), (999_950_000, "1.00 GB"), (123_456_789_012, "123.46 GB"), (999_996e6, "1.00 TB"), (5e15, "5000.00 TB"),
    ],
)  # fmt: skip
def test_a_size_has_a_unit_that_says_something(num_bytes: float, shown: str) -> None:
    assert shown_bytes(num_bytes) == shown


def test_a_class_has_its_article() -> None:
    assert [kind_of(value) for value in (3, "a", [], KeyError())] == [
        "an int",
        "a str",
        "a list",
        "a KeyError",
    ]
    assert kind_of(OSError()) == "an OSError"
