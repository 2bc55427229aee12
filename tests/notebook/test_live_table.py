"""The rows of a training run while it trains."""

from typing import Any

import pytest

from dpo_cache.notebook.live_table import LAST_ROWS, LiveTable, RunsTable

TOTAL = 17


def step(number: int, *, total: int = TOTAL, **changes: float | None) -> dict[str, Any]:
    values = {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 0.25, **changes}
    return {"step": number, "total_steps": total, **values}


def evaluation(number: int, loss: float = 0.6) -> dict[str, Any]:
    values = {"eval/loss": loss, "eval/rewards/accuracies": 0.5, "eval/rewards/margins": -0.125}
    return {"step": number, "total_steps": TOTAL, **values}


def noted(*lines: dict[str, Any]) -> LiveTable:
    table = LiveTable()
    for line in lines:
        table.note(line)
    return table


def test_a_row_has_the_means_of_its_steps() -> None:
    table = noted(*(step(number, loss=float(number)) for number in range(1, 4)))
    assert table.titles() == ["steps", "loss", "accuracy", "margin"]
    assert table.rows() == [
        ["1 to 2", "1.5000", "75.0%", "+0.2500"],
        ["3", "3.0000", "75.0%", "+0.2500"],  # the row that is being filled
    ]


def test_evaluations_are_in_the_row_of_their_step() -> None:
    table = noted(evaluation(0), step(1), step(2), evaluation(2, 0.3), step(3), evaluation(3))
    assert table.titles()[4:] == ["eval loss", "eval accuracy", "eval margin"]
    assert table.rows() == [
        ["0", "", "", "", "0.6000", "50.0%", "-0.1250"],
        ["1 to 2", "0.5000", "75.0%", "+0.2500", "0.3000", "50.0%", "-0.1250"],
        ["3", "0.5000", "75.0%", "+0.2500", "0.6000", "50.0%", "-0.1250"],
    ]


def test_rows_without_an_evaluation_are_as_wide_as_the_others() -> None:
    table = noted(step(1), step(2), step(3), evaluation(3))
    assert [len(row) for row in table.rows()] == [7, 7]


def test_a_run_has_about_ten_rows() -> None:
    table = noted(*(step(number) for number in range(1, TOTAL + 1)))
    assert [row[0] for row in table.rows()][-2:] == ["15 to 16", "17"]
    long = noted(*(step(number, total=1005) for number in range(1, 1006)))
    assert [row[0] for row in long.rows()] == [
        *(f"{first} to {first + 100}" for first in range(1, 900, 101)),
        "910 to 1005",
    ]


def test_many_evaluations_are_shown_from_the_end() -> None:
    lines = [line for number in range(1, 101) for line in (step(number, total=100), evaluation(number))]
    rows = noted(evaluation(0), *lines).rows()
    assert [row[0] for row in rows[:3]] == ["0", "…", str(101 - LAST_ROWS)] and rows[-1][0] == "100"
    assert {len(row) for row in rows} == {7}


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_an_accuracy_that_is_rounding_noise_is_left_out(unknown: float | None) -> None:
    lines = [step(1, **{"rewards/accuracies": unknown}), step(2)]
    assert noted(*lines).rows()[0][2] == "75.0%"
    assert noted(lines[0]).rows()[0][2] == "-"
    without = {**evaluation(0), "eval/rewards/accuracies": unknown}
    assert noted(without).rows() == [["0", "", "", "", "0.6000", "-", "-0.1250"]]


def test_a_sweep_has_a_row_for_each_run() -> None:
    table = RunsTable()
    table.note([("beta=0.1", None, None)])
    assert table.rows() == [["beta=0.1", "starting", "", "", ""]]
    table.note([("beta=0.1", TOTAL, step(3)), ("beta=0.2", None, None)])
    table.note([("beta=0.2", TOTAL, step(1, **{"rewards/accuracies": None}))])
    assert len(table.titles()) == 5
    assert table.rows() == [
        ["beta=0.1", "3/17", "0.5000", "75.0%", "+0.2500"],
        ["beta=0.2", "1/17", "0.5000", "-", "+0.2500"],
    ]


def test_an_evaluation_does_not_hide_the_step_of_a_run() -> None:
    table = RunsTable()
    table.note([("a", TOTAL, step(3))])
    table.note([("a", TOTAL, evaluation(3))])
    assert table.rows() == [["a", "3/17", "0.5000", "75.0%", "+0.2500"]]
