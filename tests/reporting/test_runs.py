"""The table of runs, its notes and its plot."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import OptionError
from dpo_cache.reporting.ranking import sort_rows
from dpo_cache.reporting.runs import (
    RunRow,
    check_plot,
    plot_accuracy,
    read_lines,
    read_row,
    table_cells,
    table_csv,
    table_markdown,
    table_notes,
)


def step(number: int, **changes: float) -> dict[str, Any]:
    rewards = {
        "rewards/chosen": 0.5,
        "rewards/rejected": 0.25,
        "rewards/accuracies": 0.75,
        "rewards/margins": 0.25,
    }
    return {
        "step": number,
        "loss": 0.5,
        **rewards,
        "num_pairs": 4,
        "pairs_per_s": 2.0,
        "peak_bytes": 10**9 + number,
        **changes,
    }


def evaluation(number: int, accuracy: float | None, loss: float = 0.6) -> dict[str, Any]:
    rewards = {
        "rewards/chosen": 1.0,
        "rewards/rejected": -1.0,
        "rewards/accuracies": accuracy,
        "rewards/margins": 2.0,
    }
    named = {f"eval/{name}": value for name, value in rewards.items()}
    return {"step": number, "eval/loss": loss, "eval/num_pairs": 20, **named}


def make_run(folder: Path, lines: list[dict[str, Any]], **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resolved = {"total_steps": 8, "num_shared_eval_pairs": config.pop("num_shared", 0)}
    (folder / "config.json").write_text(json.dumps({**config, "resolved": resolved}))
    return folder


def row_of(folder: Path, **changes: Any) -> RunRow:
    return read_row(folder, **{"name": folder.name, "options": {"beta": 0.1}, "state": "finished", **changes})


def test_a_row_holds_what_the_run_wrote(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "a",
        [evaluation(0, 0.5), step(1), step(2, pairs_per_s=4.0, peak_bytes=10), evaluation(2, 0.9)],
    )
    row = row_of(run)
    assert (row.num_steps, row.total_steps, row.measured_on) == (2, 8, "held out")
    assert (
        row.accuracy_before,
        row.accuracy,
        row.margin,
        row.mean_loss,
        row.chosen_reward,
        row.rejected_reward,
    ) == (0.5, 0.9, 2.0, 0.6, 1.0, -1.0)
    assert (row.steps_s, row.pairs_per_s, row.peak_bytes) == (3.0, 8 / 3, 10**9 + 1)


def test_the_evaluation_is_that_of_the_policy_that_was_saved(tmp_path: Path) -> None:
    lines = [evaluation(0, 0.5), step(1), evaluation(1, 0.9), step(2), evaluation(2, 0.7)]
    run = make_run(tmp_path / "a", lines, patience=1)
    assert row_of(run, report={"finished": True, "eval_after": evaluation(1, 0.9)}).accuracy == 0.9
    assert row_of(run).accuracy is None  # killed before it told which
    assert row_of(make_run(tmp_path / "b", lines)).accuracy == 0.7


def test_before_is_not_shown_as_after(tmp_path: Path) -> None:
    row = row_of(make_run(tmp_path / "a", [evaluation(0, 0.5), step(1)]), state="stopped")
    assert (row.accuracy_before, row.accuracy, row.measured_on) == (0.5, None, "held out")


def test_without_held_out_pairs_the_last_steps_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [step(number, loss=float(number)) for number in range(1, 13)])
    row = row_of(run)
    assert (row.measured_on, row.accuracy_before, row.accuracy, row.mean_loss) == (
        "training",
        None,
        0.75,
        7.5,
    )  # steps 3 to 12
    assert table_notes([row], set())[0].startswith("No pairs were held out")
    held_out = row_of(make_run(tmp_path / "b", [evaluation(0, 0.5), step(1), evaluation(1, 0.6)]))
    _, cells = table_cells([held_out, row])
    assert (
        cells[0][2:4] == ["50.0%", "60.0%"] and cells[1][2:8] == ["-"] * 6
    )  # of other pairs: not side by side


def test_an_accuracy_that_is_rounding_noise_is_a_dash(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [evaluation(0, None), step(1), evaluation(1, None)])
    row = row_of(run)
    assert (row.accuracy_before, row.accuracy, row.measured_on) == (None, None, "held out")
    _, cells = table_cells([row])
    assert cells[0][2:5] == ["-", "-", "+2.0000"]
    assert ",None," not in table_csv([row])
    unknown = {"rewards/accuracies": None}
    steps = [step(1, **unknown), step(2, **unknown)]
    assert row_of(make_run(tmp_path / "b", steps)).accuracy is None
    steps.append(step(3, **{"rewards/accuracies": 1.0}))  # ties count half
    assert row_of(make_run(tmp_path / "c", steps)).accuracy == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_pairs_that_are_trained_on_are_not_called_held_out(tmp_path: Path) -> None:
    lines = [evaluation(0, 0.5), step(1), evaluation(1, 0.9)]
    row = row_of(make_run(tmp_path / "a", lines, num_shared=3))
    assert row.measured_on == "evaluation" and row.is_evaluated
    assert table_cells([row])[1][0][2:4] == ["50.0%", "90.0%"]
    assert "evaluation pairs, some of whose prompts are trained on" in table_notes([row], set())[0]
    fraction = row_of(make_run(tmp_path / "b", lines, num_shared=None, eval_fraction=0.1))
    unknown = row_of(make_run(tmp_path / "c", lines, num_shared=None))  # of an earlier version
    assert (fraction.measured_on, unknown.measured_on) == ("held out", "evaluation")


def test_a_short_table_has_the_results_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [evaluation(0, 0.5), step(1), evaluation(1, 0.9)])
    titles, cells = table_cells([row_of(run)], short=True)
    assert titles == ["beta", "steps", "accuracy", "margin", "mean loss", "time s", "state"]
    assert cells == [["0.1", "1/8", "90.0%", "+2.0000", "0.6000", "2.0", "finished"]]


def test_a_run_that_has_not_begun_has_an_empty_row(tmp_path: Path) -> None:
    row = row_of(tmp_path / "none", state="waiting")
    assert table_cells([row])[1] == [["0.1", "0/?", *["-"] * 9, "waiting"]]


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [step(1)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_lines(run)] == [1]


@pytest.mark.parametrize("line", [b"torn", b"[1]", b'{"loss": 1}', b"\xff\xfe", bytes(9)])
def test_a_damaged_line_costs_only_itself(tmp_path: Path, line: bytes) -> None:
    lines = [json.dumps(step(1)).encode(), line, json.dumps(step(3)).encode(), b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [entry["step"] for entry in read_lines(tmp_path)] == [1, 3]


def test_the_best_finished_runs_come_first(tmp_path: Path) -> None:
    found = {
        "middle": ("finished", 0.7),
        "failed": ("failed", 0.99),
        "best": ("finished", 0.9),
        "tie": ("finished", 0.7),
    }
    rows = [
        row_of(make_run(tmp_path / name, [evaluation(0, 0.5), step(1), evaluation(1, value)]), state=state)
        for name, (state, value) in found.items()
    ]
    assert [row.name for row in sort_rows(rows)] == ["best", "middle", "tie", "failed"]


def test_notes_name_what_cannot_be_compared(tmp_path: Path) -> None:
    row = row_of(make_run(tmp_path / "a", [evaluation(0, 0.5), step(1), evaluation(1, 0.6)]))
    assert any(
        note.startswith("Mean loss, margin and rewards depend on beta. Compare them only between runs")
        for note in table_notes([row], {"beta"})
    )
    assert len(table_notes([row], {"loss"})) == 2


def test_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a,b", [evaluation(0, 0.5), step(1), evaluation(1, 2 / 3)])
    rows = [
        row_of(run, options={"loss": ("sigmoid:0.8", "sft:0.2"), "model": "x|y"}),
        row_of(
            tmp_path / "c", options={"loss": ("ipo",), "model": None}, state="failed", error="out, of luck"
        ),
    ]
    first, second = csv.DictReader(io.StringIO(table_csv(rows)))
    assert (first["name"], first["loss"], float(first["accuracy"]), first["accuracy_before"]) == (
        "a,b",
        "sigmoid:0.8+sft:0.2",
        2 / 3,
        "0.5",
    )
    assert (second["model"], second["state"], second["error"], second["accuracy"]) == (
        "none",
        "failed",
        "out, of luck",
        "",
    )
    page = table_markdown("Sweep x", rows, ["A note."])
    assert page.startswith("# Sweep x\n\n| loss | model | steps |") and "| x\\|y |" in page
    assert "- c failed: out, of luck\n" in page and page.endswith("\n\nA note.\n")


def test_the_plot(tmp_path: Path) -> None:
    runs = [
        (name, make_run(tmp_path / name, [evaluation(0, 0.5), step(1), evaluation(1, 0.6)]))
        for name in ("one", "two")
    ]
    runs.append(("noise", make_run(tmp_path / "noise", [evaluation(0, None), step(1), evaluation(1, 0.6)])))
    check_plot(tmp_path / "plot.svg")
    plot_accuracy([*runs, ("none yet", tmp_path / "none")], tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(OptionError, match=r"plot\.txt: expected a file that ends in \.svg, \.png or \.pdf\."):
        check_plot(tmp_path / "plot.txt")
    with pytest.raises(OptionError, match="there is no folder"):
        check_plot(tmp_path / "no" / "plot.svg")
