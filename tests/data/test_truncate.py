import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_cache.data import Dropped, Truncation, make_pair
from dpo_cache.data.truncate import EQUAL, EQUAL_AFTER_CUT, NO_ANSWER, NO_PROMPT, PROMPT_FILLS, TOO_LONG
from dpo_cache.types import Completion, Pair

MODES = ("keep-start", "keep-end", "prompt-left", "drop")

Row = tuple[list[int], list[int], list[int]]
tokens = st.lists(st.integers(0, 2), max_size=8)
some_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)
rows = st.tuples(tokens, tokens, tokens)
good_rows = st.tuples(some_tokens, some_tokens, some_tokens).filter(lambda row: row[1] != row[2])


@st.composite
def truncations(draw: st.DrawFn, *modes: str, at_least: int = 2) -> Truncation:
    mode, max_length = draw(st.sampled_from(modes or MODES)), draw(st.integers(at_least, at_least + 8))
    max_prompt_length = draw(st.none() | st.integers(1, max_length - 1)) if mode == "prompt-left" else None
    return Truncation(max_length, mode, max_prompt_length)


def size(row: Row) -> int:
    """Tokens of the longer sequence."""
    prompt, chosen, rejected = row
    return len(prompt) + max(len(chosen), len(rejected))


def cut(row: Row, truncation: Truncation) -> tuple[Pair | Dropped, bool]:
    prompt, chosen, rejected = (np.array(ids, np.uint32) for ids in row)
    return make_pair(7, prompt, chosen, rejected, truncation)


def kept(row: Row, truncation: Truncation) -> tuple[Completion, Completion]:
    """Both completions; the example is passed over where there are none."""
    pair, _ = cut(row, truncation)
    assume(isinstance(pair, Pair))
    assert pair.row == 7
    return pair.chosen, pair.rejected


def plain(pair: Pair | Dropped) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Prompt and completion, of chosen and of rejected."""
    assert isinstance(pair, Pair), pair
    chosen, rejected = (
        (side.prompt_ids.tolist(), side.completion_ids.tolist()) for side in (pair.chosen, pair.rejected)
    )
    return chosen, rejected


@given(rows, truncations())
@settings(deadline=None, max_examples=300)
def test_nothing_is_longer_than_max_length_and_nothing_is_empty(row: Row, truncation: Truncation) -> None:
    pair, _ = cut(row, truncation)
    for completion in (pair.chosen, pair.rejected) if isinstance(pair, Pair) else ():
        assert len(completion.prompt_ids) >= 1
        assert len(completion.completion_ids) >= 1
        assert len(completion.sequence_ids) <= truncation.max_length
        assert completion.prompt_ids.dtype == completion.completion_ids.dtype == np.uint32


@given(good_rows, st.sampled_from(MODES), st.integers(0, 3))
@settings(deadline=None)
def test_rows_that_fit_are_left_as_they_are(row: Row, mode: str, room: int) -> None:
    prompt, chosen, rejected = row
    pair, was_cut = cut(row, Truncation(size(row) + room, mode))
    assert plain(pair) == ((prompt, chosen), (prompt, rejected))
    assert not was_cut


@given(rows, truncations())
@settings(deadline=None, max_examples=300)
def test_a_pair_counts_as_cut_exactly_if_a_sequence_lost_tokens(row: Row, truncation: Truncation) -> None:
    prompt, *answers = row
    pair, was_cut = cut(row, truncation)
    if isinstance(pair, Pair):
        sequences = [side.sequence_ids.tolist() for side in (pair.chosen, pair.rejected)]
        assert was_cut == (sequences != [prompt + answer for answer in answers])


@given(good_rows, st.integers(1, 8))
@settings(deadline=None)
def test_keep_start_keeps_the_first_tokens(row: Row, room: int) -> None:
    prompt, *answers = row
    max_length = len(prompt) + room
    for completion, answer in zip(kept(row, Truncation(max_length, "keep-start")), answers, strict=True):
        assert completion.sequence_ids.tolist() == (prompt + answer)[:max_length]
        assert completion.prompt_ids.tolist() == prompt


@given(good_rows, truncations("keep-end"))
@settings(deadline=None)
def test_keep_end_keeps_the_last_tokens(row: Row, truncation: Truncation) -> None:
    prompt, *answers = row
    for completion, answer in zip(kept(row, truncation), answers, strict=True):
        sequence = completion.sequence_ids.tolist()
        assert sequence == (prompt + answer)[-truncation.max_length :]
        assert completion.num_tokens == min(len(answer), len(sequence) - 1)


@given(good_rows, truncations("prompt-left"))
@settings(deadline=None)
def test_prompt_left_keeps_the_end_of_the_prompt_and_the_start_of_the_answers(
    row: Row, truncation: Truncation
) -> None:
    prompt, *answers = row
    is_long = size(row) > truncation.max_length
    room = truncation.max_prompt_length or truncation.max_length // 2
    prompt_left = prompt[-room:] if is_long else prompt
    still_long = len(prompt_left) + max(map(len, answers)) > truncation.max_length
    for completion, answer in zip(kept(row, truncation), answers, strict=True):
        assert completion.prompt_ids.tolist() == prompt_left
        assert completion.completion_ids.tolist() == (
            answer[: truncation.max_length - room] if still_long else answer
        )


@given(good_rows, truncations("drop", at_least=5))
@settings(deadline=None)
def test_drop_drops_exactly_the_long_rows(row: Row, truncation: Truncation) -> None:
    prompt, chosen, rejected = row
    pair, was_cut = cut(row, truncation)
    if size(row) > truncation.max_length:
        assert pair == Dropped(TOO_LONG)
    else:
        assert plain(pair) == ((prompt, chosen), (prompt, rejected))
    assert not was_cut


@given(rows, truncations())
@settings(deadline=None, max_examples=300)
def test_a_row_is_dropped_only_for_a_reason_that_holds(row: Row, truncation: Truncation) -> None:
    prompt, chosen, rejected = row
    is_long = size(row) > truncation.max_length
    holds = {
        EQUAL: chosen == rejected,
        NO_ANSWER: not chosen or not rejected,
        TOO_LONG: truncation.mode == "drop" and is_long,
        NO_PROMPT: not prompt,
        PROMPT_FILLS: truncation.mode == "keep-start" and len(prompt) >= truncation.max_length,
        EQUAL_AFTER_CUT: truncation.mode != "drop" and is_long and chosen != rejected,
    }
    pair, _ = cut(row, truncation)
    assert isinstance(pair, Pair) or holds[pair.reason]


@given(rows, truncations())
@settings(deadline=None, max_examples=300)
def test_the_two_completions_of_a_pair_differ(row: Row, truncation: Truncation) -> None:
    pair, _ = cut(row, truncation)
    assert (
        isinstance(pair, Dropped) or pair.chosen.sequence_ids.tolist() != pair.rejected.sequence_ids.tolist()
    )


@given(good_rows, truncations("keep-start", "prompt-left", "drop", at_least=5))
@settings(deadline=None)
def test_both_prompts_are_the_same_except_under_keep_end(row: Row, truncation: Truncation) -> None:
    pair, _ = cut(row, truncation)
    assert isinstance(pair, Dropped) or pair.chosen.prompt_ids.tolist() == pair.rejected.prompt_ids.tolist()


def test_a_row_without_prompt_tokens_gives_no_two_prompts() -> None:
    pair, _ = cut(([], [1, 2], [3, 2]), Truncation())
    assert isinstance(pair, Dropped) or pair.chosen.prompt_ids.tolist() == pair.rejected.prompt_ids.tolist()


PROMPT, CHOSEN, REJECTED = [1, 2, 3, 4], [10, 11, 12, 13], [20, 21]

EXAMPLES = {
    "keep-start cuts the answers' ends": (
        Truncation(6, "keep-start"),
        ([1, 2, 3, 4], [10, 11]),
        ([1, 2, 3, 4], [20, 21]),
    ),
    "keep-start leaves one token": (Truncation(5, "keep-start"), ([1, 2, 3, 4], [10]), ([1, 2, 3, 4], [20])),
    "keep-end cuts each prompt's start": (
        Truncation(6, "keep-end"),
        ([3, 4], [10, 11, 12, 13]),
        ([1, 2, 3, 4], [20, 21]),
    ),
    "keep-end cuts both prompts": (Truncation(5, "keep-end"), ([4], [10, 11, 12, 13]), ([2, 3, 4], [20, 21])),
    "keep-end cuts into an answer": (Truncation(4, "keep-end"), ([10], [11, 12, 13]), ([3, 4], [20, 21])),
    "keep-end leaves one token": (Truncation(2, "keep-end"), ([12], [13]), ([20], [21])),
    "prompt-left halves by default": (
        Truncation(6, "prompt-left"),
        ([2, 3, 4], [10, 11, 12]),
        ([2, 3, 4], [20, 21]),
    ),
    "prompt-left to a given length": (
        Truncation(6, "prompt-left", 1),
        ([4], [10, 11, 12, 13]),
        ([4], [20, 21]),
    ),
    "prompt-left with a longer length": (
        Truncation(7, "prompt-left", 6),
        ([1, 2, 3, 4], [10]),
        ([1, 2, 3, 4], [20]),
    ),
    "prompt-left cuts the answers too": (Truncation(3, "prompt-left", 2), ([3, 4], [10]), ([3, 4], [20])),
    "drop keeps what fits": (
        Truncation(8, "drop"),
        ([1, 2, 3, 4], [10, 11, 12, 13]),
        ([1, 2, 3, 4], [20, 21]),
    ),
}


@pytest.mark.parametrize(("truncation", "chosen", "rejected"), EXAMPLES.values(), ids=EXAMPLES)
def test_worked_examples(
    truncation: Truncation, chosen: tuple[list[int], list[int]], rejected: tuple[list[int], list[int]]
) -> None:
    pair, was_cut = cut((PROMPT, CHOSEN, REJECTED), truncation)
    assert plain(pair) == (chosen, rejected)
    assert was_cut == (truncation.mode != "drop")


DROPPED = {
    "equal answers": ((PROMPT, CHOSEN, CHOSEN), Truncation(100), "chosen equals rejected", False),
    "equal long answers": ((PROMPT, CHOSEN, CHOSEN), Truncation(5, "drop"), "chosen equals rejected", False),
    "equal after keep-start": (
        ([1], [2, 3, 4], [2, 3, 5]),
        Truncation(3),
        "chosen equals rejected after truncation",
        True,
    ),
    "equal after keep-end": (
        ([1], [2, 3, 4], [5, 3, 4]),
        Truncation(2, "keep-end"),
        "chosen equals rejected after truncation",
        True,
    ),
    "equal after prompt-left": (
        ([1, 2], [3, 4], [3, 5]),
        Truncation(2, "prompt-left"),
        "chosen equals rejected after truncation",
        True,
    ),
    "no answer": ((PROMPT, [], REJECTED), Truncation(100), "no answer tokens", False),
    "no other answer": ((PROMPT, CHOSEN, []), Truncation(100), "no answer tokens", False),
    "long prompt": (
        (PROMPT, CHOSEN, REJECTED),
        Truncation(4),
        "prompt leaves no room for an answer within max_length",
        False,
    ),
    "long row": ((PROMPT, CHOSEN, REJECTED), Truncation(7, "drop"), "longer than max_length", False),
}


@pytest.mark.parametrize(("row", "truncation", "reason", "was_cut"), DROPPED.values(), ids=DROPPED)
def test_a_dropped_row_says_why(row: Row, truncation: Truncation, reason: str, was_cut: bool) -> None:
    assert cut(row, truncation) == (Dropped(reason), was_cut)


def test_one_answer_that_begins_the_other_is_a_pair() -> None:
    pair, was_cut = cut(([1], [2, 3, 4], [2, 3]), Truncation(100))
    assert plain(pair) == (([1], [2, 3, 4]), ([1], [2, 3]))
    assert not was_cut
