from typing import Any

import pytest

from dpo_cache.data.examples import Example
from dpo_cache.data.formats import FORMATS as ALL_FORMATS
from dpo_cache.data.formats import RANKED, check_format, detect_format, unused_columns
from dpo_cache.data.refusals import ACCEPTED
from dpo_cache.errors import DataError
from dpo_cache.options.exchange import IMPORT_FORMATS
from dpo_cache.options.precompute import FORMATS as PRECOMPUTE_FORMATS
from dpo_cache.options.precompute import RANKED_FORMATS
from tests.data import test_compared, test_ranked, test_two_sides
from tests.data.conftest import assistant, user
from tests.data.test_examples import FORMATS as COMMON_FORMATS
from tests.data.test_examples import TEXT

FORMATS: dict[str, tuple[str, dict[str, Any], Example]] = {
    **COMMON_FORMATS,
    **test_two_sides.SHAPES,
    **test_ranked.SHAPES,
    **{name: ("compared", row, example) for name, (row, example) in test_compared.SHAPES.items()},
}


@pytest.mark.parametrize(("data_format", "row", "_"), FORMATS.values(), ids=FORMATS)
def test_each_format_is_recognised(data_format: str, row: dict[str, Any], _: Example) -> None:
    assert detect_format(list(row), row) == data_format


@pytest.mark.parametrize(("data_format", "row", "_"), FORMATS.values(), ids=FORMATS)
def test_a_format_may_be_named(data_format: str, row: dict[str, Any], _: Example) -> None:
    assert check_format(data_format, list(row)) == data_format


def test_a_prompt_column_next_to_an_instruction_is_the_prompt() -> None:
    assert detect_format(["instruction", *TEXT], TEXT) == "text"


@pytest.mark.parametrize(
    ("columns", "shown"),
    [(["question", "answer"], "question, answer"), (["prompt", "chosen"], "prompt, chosen"), ([], "(none)")],
)
def test_other_data_is_refused_with_the_formats_that_are_accepted(columns: list[str], shown: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(columns, {})
    assert str(caught.value) == (
        f"the data is not preference data: found the columns {shown}; accepted are\n{ACCEPTED}\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question, or rename them."
    )


EXTRA = {"system": "Be brief.", "history": [], "tools": "[]", "chat_template_kwargs": {}}


@pytest.mark.parametrize(
    ("data_format", "row", "unused"),
    [
        ("text", TEXT, ["system", "history", "tools", "chat_template_kwargs"]),
        (
            "implicit",
            {"chosen": "a b", "rejected": "a c"},
            ["system", "history", "tools", "chat_template_kwargs"],
        ),
        (
            "implicit",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            ["system", "history"],
        ),
        (
            "ranked",
            {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
            ["system", "history", "tools", "chat_template_kwargs"],
        ),
        ("ranked", {"prompt": [user("a")], "responses": ["b", "c"], "scores": [1, 2]}, ["history"]),
        ("alpaca", {"instruction": "a", "chosen": "b", "rejected": "c"}, []),
    ],
)
def test_columns_that_the_rows_do_not_use_are_found(
    data_format: str, row: dict[str, Any], unused: list[str]
) -> None:
    assert unused_columns(data_format, [*row, *EXTRA], {**row, **EXTRA}) == unused
    assert unused_columns(data_format, list(row), row) == []


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(DataError) as caught:
        check_format("question", ["prompt", "chosen", "rejected"])
    assert str(caught.value) == (
        "`format` question needs the columns question, chosen, rejected; the data has no question, but "
        "prompt, chosen, rejected.\n"
        "Name the columns that correspond with `map`, for example `map` prompt=question."
    )


def test_the_options_name_every_format() -> None:
    assert sorted(PRECOMPUTE_FORMATS) == sorted(["auto", *ALL_FORMATS])
    assert set(IMPORT_FORMATS) == {"auto", *ALL_FORMATS, "ids"} - {*RANKED}
    assert RANKED == RANKED_FORMATS
    assert {data_format for data_format, _, _ in FORMATS.values()} == set(ALL_FORMATS)
