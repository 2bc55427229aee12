from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from dpo_cache.data import ShownRow, Survey, Truncation, make_pairs, show_rows, tokenize_rows
from dpo_cache.data.prompt_end import ENDS_LATER
from dpo_cache.data.shown_rows import ShownSide
from tests.data.conftest import assistant, make_byte_tokenizer, make_prefix_space_tokenizer, user

EOS = "<|im_end|>"


def text(number: int, chosen: str = " the cat", rejected: str = " the dog") -> dict[str, str]:
    return {"prompt": f"what is the answer {number}?", "chosen": chosen, "rejected": rejected}


def shown(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    num_rows: int,
    truncation: Truncation | None = None,
    *,
    window_rows: int = 4,
    data_format: str = "text",
) -> list[ShownRow]:
    """The rows shown of a set that is planned in windows of so many."""
    truncation = truncation or Truncation()
    survey = Survey("pairs/train", data_format)
    tokenized = tokenize_rows(Dataset.from_list(rows), data_format, tokenizer)
    for outcome in make_pairs(tokenized, truncation):
        survey.add(outcome)
    starts = range(0, len(tokenized), window_rows)
    windows = [tokenized.select(range(start, min(start + window_rows, len(tokenized)))) for start in starts]
    assert concatenate_datasets(windows)["row"][:] == tokenized["row"][:]
    return show_rows(windows, survey, tokenizer, truncation, num_rows)


@pytest.mark.parametrize(
    ("num_rows", "numbers"), [(1, [0]), (2, [0, 9]), (3, [0, 4, 9]), (4, [0, 3, 6, 9]), (50, list(range(10)))]
)
def test_rows_are_spread_evenly_over_the_windows(num_rows: int, numbers: list[int]) -> None:
    tokenizer = make_byte_tokenizer()
    found = shown([text(number) for number in range(10)], tokenizer, num_rows)
    assert [row.row for row in found] == numbers
    assert [row.chosen.prompt for row in found] == [f"what is the answer {number}?" for number in numbers]


@pytest.mark.parametrize(
    ("make", "start"), [(make_byte_tokenizer, ""), (make_prefix_space_tokenizer, "<s> ")]
)
def test_the_parts_of_a_row_are_its_text(make: Callable[[], PreTrainedTokenizerFast], start: str) -> None:
    (row,) = shown([text(0, " é🙂", "🙂 the  ")], make(), 1)
    assert (row.chosen.prompt, row.chosen.answer) == (f"{start}what is the answer 0?", f" é🙂{EOS}")
    assert (row.rejected.prompt, row.rejected.answer) == (f"{start}what is the answer 0?", f"🙂 the  {EOS}")
    assert row.special_tokens == tuple(filter(None, (start.strip(), EOS)))


SENTENCE = "abcdefgh"
CUTS: dict[str, tuple[Truncation, ShownSide, ShownSide]] = {
    "whole": (
        Truncation(13),
        ShownSide("", SENTENCE, f"1234{EOS}", "", (0, 8, 5, 0)),
        ShownSide("", SENTENCE, f"5{EOS}", "", (0, 8, 2, 0)),
    ),
    "keep-start": (
        Truncation(10),
        ShownSide("", SENTENCE, "12", f"34{EOS}", (0, 8, 2, 3)),
        ShownSide("", SENTENCE, f"5{EOS}", "", (0, 8, 2, 0)),
    ),
    "keep-end": (
        Truncation(10, "keep-end"),
        ShownSide("abc", "defgh", f"1234{EOS}", "", (3, 5, 5, 0)),
        ShownSide("", SENTENCE, f"5{EOS}", "", (0, 8, 2, 0)),
    ),
    "keep-end, only the answer": (
        Truncation(4, "keep-end"),
        ShownSide(f"{SENTENCE}1", "2", f"34{EOS}", "", (9, 1, 3, 0)),
        ShownSide("abcdef", "gh", f"5{EOS}", "", (6, 2, 2, 0)),
    ),
    "prompt-left": (
        Truncation(7, "prompt-left", 4),
        ShownSide("abcd", "efgh", "123", f"4{EOS}", (4, 4, 3, 2)),
        ShownSide("abcd", "efgh", f"5{EOS}", "", (4, 4, 2, 0)),
    ),
}


@pytest.mark.parametrize(("truncation", "chosen", "rejected"), CUTS.values(), ids=CUTS)
def test_what_is_cut_is_shown_where_it_was(
    truncation: Truncation, chosen: ShownSide, rejected: ShownSide
) -> None:
    row = {"prompt": SENTENCE, "chosen": "1234", "rejected": "5"}
    (found,) = shown([row], make_byte_tokenizer(), 1, truncation)
    assert found == ShownRow(0, chosen, rejected, was_cut=truncation.max_length < 13, special_tokens=(EOS,))


def test_one_more_row_of_each_finding_is_shown() -> None:
    rows = [text(number) for number in range(9)]
    rows[2]["rejected"] = rows[2]["chosen"]  # dropped: equal
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["chosen"] = " the cat sat"  # cut
    rows[6]["prompt"] = "t" * 40  # dropped: no room
    found = shown(rows, make_byte_tokenizer(), 1, Truncation(33))
    assert [(row.row, row.dropped, row.was_cut) for row in found] == [
        (0, None, False),
        (2, "chosen equals rejected", False),
        (6, "prompt leaves no room for an answer within max_length", False),
        (5, None, True),
    ]
    assert found[2].chosen.prompt == "t" * 40 and found[2].chosen.answer == f" the cat{EOS}"


def test_notes_early_answers_and_rows_without_ids_are_shown() -> None:
    tokenizer = make_byte_tokenizer([("b", "c")])
    (row,) = shown([{"prompt": "ab", "chosen": "cd", "rejected": "x"}], tokenizer, 1)
    assert row.moved_boundary and (row.chosen.prompt, row.chosen.answer) == ("a", f"bcd{EOS}")
    dialogue = [user("a"), assistant("b"), user("c")]
    both = {
        "prompt": "a",
        "chosen": [*dialogue, assistant("d")],
        "rejected": [*dialogue, assistant("e")],
    }
    (row,) = shown([both], tokenizer, 1, data_format="conversation")
    assert row.notes == (ENDS_LATER,) and row.chosen.answer == f"d{EOS}\n"
    rows = [
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]},
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
    ]
    empty = ShownSide("", "", "", "", (0, 0, 0, 0))
    found = shown(rows, tokenizer, 2, data_format="ranked")
    assert found[0] == ShownRow(0, empty, empty, dropped="answers all ranked alike")


def test_a_letter_of_several_tokens_that_is_cut_is_no_error() -> None:
    (row,) = shown(
        [{"prompt": "a", "chosen": "🙂🙂", "rejected": "b"}], make_byte_tokenizer(), 1, Truncation(3)
    )
    assert row.chosen.num_tokens == (0, 1, 2, 7) and row.chosen.prompt == "a"
    assert row.chosen.cut_after.endswith(f"🙂{EOS}")
