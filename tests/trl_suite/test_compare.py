"""What TRL's trainer passes and ours does not is found, with its reason or without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset

pytest.importorskip("trl", reason="TRL is not installed")

from tests.trl_suite import compare, prepare


def test_tests_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compare, "DIFFERENT", {"*::test_ref*": "refused", "*::test_old": "was different once"}
    )
    theirs = {
        "A::test_ref": "passed",
        "A::test_new": "passed",
        "A::test_bad": "failed",
        "A::test_good": "passed",
        "A::test_old": "passed",
    }
    ours = {
        "A::test_ref": "failed",
        "A::test_bad": "failed",
        "A::test_good": "passed",
        "A::test_old": "passed",
    }
    found = compare.compare(*({test: (kind, "") for test, kind in side.items()} for side in (theirs, ours)))
    assert found == ([("A::test_ref", "refused")], ["A::test_new"], ["*::test_old"])


def test_failures_are_counted_by_test_and_error() -> None:
    outcomes = {
        "A::test_one[1]": ("failed", "OSError: no such model"),
        "A::test_one[2]": ("failed", "OSError: no such model"),
        "A::test_two": ("failed", "TypeError: new keyword"),
        "A::test_three": ("skipped", "needs a GPU"),
    }
    assert compare.failures(outcomes) == {
        ("A::test_one", "OSError: no such model"): 2,
        ("A::test_two", "TypeError: new keyword"): 1,
    }


@pytest.mark.parametrize(
    ("test", "is_different"),
    [
        ("test_evaluate_with_eval_dataset[dict_of_iterable_dataset-True]", True),
        ("test_evaluate_with_eval_dataset[dict_of_iterable_dataset-False]", False),
        ("test_evaluate_with_eval_dataset[dataset-True]", False),
        ("test_precompute_ref_log_probs_raises_for_iterable_dataset[eval_dict]", True),
        ("test_train_with_iterable_dataset", False),
    ],
)
def test_patterns_are_of_the_right_tests(test: str, is_different: bool) -> None:
    passed, failed = {f"A::{test}": ("passed", "")}, {f"A::{test}": ("failed", "")}
    different, unexpected, _ = compare.compare(passed, failed)
    assert (len(different), len(unexpected)) == ((1, 0) if is_different else (0, 1))


def test_data_sets_are_read_by_their_names(tmp_path: Path) -> None:
    prepare._write_data(tmp_path / "zen", prepare.ZEN)
    for name in prepare.ZEN:
        rows = load_dataset(str(tmp_path / "zen"), name, cache_dir=str(tmp_path / "read"))
        assert {split: len(part) for split, part in rows.items()} == prepare.ROWS
    assert rows["test"][0]["prompt"] == "Name a tree:"
