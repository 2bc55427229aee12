"""The survey of the data, before a model is loaded."""

from dataclasses import asdict

import numpy as np
import pytest

from dpo_cache.data.early_answers import GENERATION_PROMPT, LINE_BREAKS
from dpo_cache.data.survey import PERCENTILES, Survey
from dpo_cache.data.truncate import Dropped, Outcome
from dpo_cache.errors import DataError
from dpo_cache.types import Completion, Pair


def outcome(
    row: int, prompt: int, chosen: int, rejected: int, *, was_cut: bool = False, moved: bool = False
) -> Outcome:
    def side(length: int) -> Completion:
        return Completion(np.zeros(prompt, np.uint32), np.full(length, 1, np.uint32))

    return Outcome(row, Pair(row, side(chosen), side(rejected)), was_cut, moved)


def test_counts_rows_and_names_the_first_three() -> None:
    survey = Survey("pairs/train", "text")
    for row in range(10):
        survey.add(outcome(row, 4, 2, 3, was_cut=row % 2 == 1, moved=row == 7))
    for row in range(10, 15):
        survey.add(Outcome(row, Dropped("longer than max_length"), True, True))
    assert (survey.rows_read, survey.pairs_kept) == (15, 10)
    assert asdict(survey.truncated) == {"count": 5, "rows": [1, 3, 5]}
    assert asdict(survey.moved_boundary) == {"count": 1, "rows": [7]}
    assert {reason: asdict(finding) for reason, finding in survey.dropped.items()} == {
        "longer than max_length": {"count": 5, "rows": [10, 11, 12]}
    }
    assert survey.data_tokens == 10 * (4 + 2 + 4 + 3)


def test_a_note_counts_each_of_its_rows_once_also_where_the_row_is_dropped() -> None:
    survey = Survey("pairs/train", "ranked")
    for row in (0, 0, 1):
        survey.add(outcome(row, 4, 2, 3)._replace(notes=("its images are left out",)))
    survey.add(Outcome(2, Dropped("longer than max_length"), False, False, ("its images are left out",)))
    assert asdict(survey.notes["its images are left out"]) == {"count": 3, "rows": [0, 1, 2]}
    assert survey.remarks() == ["pairs/train: its images are left out: 3 of 3 rows (row 0, 1, 2)."]


def test_notes_of_a_stream_are_announced_once_before_they_are_counted() -> None:
    survey = Survey("pairs/train", "text")
    announced = []
    for row, note in enumerate(["a", "a", "b", "a"]):
        survey.add(outcome(row, 4, 2, 3)._replace(notes=(note,)))
        announced.append(survey.first_remarks())
    first, second = (
        f"pairs/train: {note}: row {row} is the first; the end has the count."
        for note, row in (("a", 0), ("b", 2))
    )
    assert announced == [[first], [], [second], []]


def test_a_ranked_row_is_one_row_of_several_pairs() -> None:
    survey = Survey("pairs/train", "ranked")
    for row in (0, 0, 0, 1):
        survey.add(outcome(row, 4, 2, 3, was_cut=True))
    assert (survey.rows_read, survey.pairs_kept, survey.truncated.count) == (2, 4, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101, 1000])
def test_lengths_are_percentiles_that_occur(count: int) -> None:
    survey = Survey("pairs/train", "text")
    generator = np.random.default_rng(count)
    prompts = generator.integers(1, 500, count)
    for row, prompt in enumerate(prompts.tolist()):
        survey.add(outcome(row, prompt, 1, 1))
    both = np.repeat(prompts, 2)  # each prompt has two answers
    expected = [int(np.percentile(both, share, method="inverted_cdf")) for share in PERCENTILES]
    assert survey.lengths()["prompt"] == expected
    assert survey.lengths()["answer"] == [1] * len(PERCENTILES)
    assert survey.longest == int(prompts.max()) + 1


EARLY = (
    "the answers of 5 of 8 pairs of pairs/train (row 0, 1, 2, …) start early: the ids of prompt + answer do not "
    "begin with the ids of the prompt, so its end would be scored as a part of the answer. In most rows of a "
    "set, that is the sign of a wrong format.\n"
)


@pytest.mark.parametrize(
    ("num_early", "num_rows", "notes", "stops"),
    [
        (5, 8, (), True),
        (4, 8, (), False),
        (3, 3, (), False),
        (4, 4, (), True),
        (8, 8, (GENERATION_PROMPT,), False),
        (8, 8, (LINE_BREAKS,), False),
        (8, 8, ("another note",), True),
    ],
)
def test_answers_that_start_early_in_most_rows_stop(
    num_early: int, num_rows: int, notes: tuple[str, ...], stops: bool
) -> None:
    survey = Survey("pairs/train", "text")
    for row in range(num_rows):
        survey.add(outcome(row, 4, 2, 3, moved=row < num_early)._replace(notes=notes))
    assert survey.starts_early == stops
    if not stops:
        survey.check_boundary()
        return
    with pytest.raises(DataError) as raised:
        survey.check_boundary()
    survey.data_format = "implicit"  # the prompt is what two texts share, and ends within a word
    survey.check_boundary()
    if (num_early, num_rows) == (5, 8):
        assert str(raised.value).startswith(EARLY)
    assert "`show` 3" in str(raised.value) and "`early_answers` keep" in str(raised.value)
