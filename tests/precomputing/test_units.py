"""Units of work: cut from windows; their scores are published even if scoring fails."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_cache import data
from dpo_cache.data import Survey, Truncation
from dpo_cache.lm.progress import ScoringStep, extrapolate
from dpo_cache.precomputing import units
from dpo_cache.precomputing.units import Unit, cut_units, score_unit
from dpo_cache.precomputing.windows import Planner, SplitPlan
from dpo_cache.store import completion_key, open_cache
from dpo_cache.types import Score
from tests.conftest import chat_rows, make_completions, make_llama, make_tokenizer, write_rows


def windows_of(tmp_path: Path, window_rows: int, published: list[bytes] | None = None) -> Any:
    """The windows of twelve rows, in a cache that holds the scores of some keys."""
    scores = open_cache(tmp_path / "cache", create=True).scores("0" * 64)
    if published:
        scores.publish([(key, Score(np.zeros(1, np.float32))) for key in published])
    rows = data.read_dataset(write_rows(tmp_path / "pairs.jsonl", chat_rows()))["train"]
    split = SplitPlan("train", rows, Survey("pairs/train", "conversation"))
    planner = Planner(scores, Truncation(), make_llama().config, "tiny")
    tokenized = data.tokenized_windows(
        rows, "conversation", make_tokenizer(), window_rows=window_rows, spool=tmp_path, place="rows"
    )
    return list(planner.plan(split, tokenized))


def test_each_missing_completion_is_in_one_unit_with_its_key_and_rows(tmp_path: Path) -> None:
    windows = windows_of(tmp_path, 5)
    cut = list(cut_units(windows, Truncation()))
    keys = [key for unit in cut for key in unit.keys]
    assert len(cut) == 3 and len(keys) == len(set(keys)) == 20
    for unit in cut:
        assert len(unit) == len(unit.completions) == len(unit.rows)
        assert unit.keys == [completion_key(completion) for completion in unit.completions]
        assert all(1 <= len(rows) <= 3 for rows in unit.rows)
    first, window = cut[0], windows[0]
    holders = np.flatnonzero((window.chosen_keys == first.keys[0]) | (window.rejected_keys == first.keys[0]))
    assert first.rows[0] == holders.tolist()[:3]
    assert [unit.planned_tokens for unit in cut] == [window.missing_tokens for window in windows]


def test_a_window_that_lacks_nothing_makes_no_unit(tmp_path: Path) -> None:
    all_keys = [key for unit in cut_units(windows_of(tmp_path, 6), Truncation()) for key in unit.keys]
    again = windows_of(tmp_path, 6, published=all_keys[1:])
    assert [unit.keys for unit in cut_units(again, Truncation())] == [all_keys[:1]]
    assert list(cut_units(windows_of(tmp_path, 6, published=all_keys), Truncation())) == []


def make_unit(num: int = 6) -> Unit:
    completions = make_completions()[:num]
    return Unit(
        [b"%02d" % place for place in range(num)], completions, [[place] for place in range(num)], 100
    )


def fake_runner(fails_after: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> Any:
    def score(completions: Any, *, rows_of: Any) -> Iterator[ScoringStep]:
        assert list(rows_of(1)) == [1]
        for place in range(len(completions)):
            if place == fails_after:
                raise error
            yield ScoringStep(1, len(completions), [(place, Score(np.zeros(1, np.float32)))])

    return SimpleNamespace(score=score)


def test_scores_are_published_at_once_where_scoring_is_quick() -> None:
    published, waiting = [], []
    score_unit(
        make_unit(),
        fake_runner(),
        lambda scored: published.append([key for key, _ in scored]),
        lambda step, num_waiting: waiting.append(num_waiting),
    )
    assert published == [[b"00", b"01", b"02", b"03", b"04", b"05"]] and waiting == [1, 2, 3, 4, 5, 6]


def test_slow_scoring_publishes_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "FLUSH_S", 0.0)
    published, waiting = [], []
    score_unit(
        make_unit(3),
        fake_runner(),
        lambda scored: published.append([key for key, _ in scored]),
        lambda step, num_waiting: waiting.append(num_waiting),
    )
    assert published == [[b"00"], [b"01"], [b"02"]] and waiting == [0, 0, 0]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_all_that_was_scored_is_published_whatever_ends_it(error: type[BaseException]) -> None:
    published: list[bytes] = []
    with pytest.raises(error):
        score_unit(
            make_unit(),
            fake_runner(fails_after=4, error=error),
            lambda scored: published.extend(key for key, _ in scored),
            lambda step, num_waiting: None,
        )
    assert published == [b"00", b"01", b"02", b"03"]


def test_a_publishing_that_is_interrupted_is_done_again() -> None:
    published: list[bytes] = []
    interrupts = [KeyboardInterrupt]

    def publish(scored: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        published.extend(key for key, _ in scored)

    with pytest.raises(KeyboardInterrupt):
        score_unit(make_unit(2), fake_runner(), publish, lambda step, num_waiting: None)
    assert published == [b"00", b"01"]


def test_what_is_left_is_expected_to_run_like_what_is_known() -> None:
    assert extrapolate(300, 100, 100) == 300
    assert extrapolate(300, 100, 250) == 750
