"""Whole sweeps: each run equals the same run by `train`, and a failure does not affect the others."""

import csv
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import dpo_cache
from dpo_cache.errors import DpoCacheError, NotInCacheError, OptionError
from dpo_cache.sweeping import SweepProgress, SweepReport, processes
from dpo_cache.sweeping.processes import ActiveRun, run_environment
from dpo_cache.sweeping.sweep_folder import Run
from tests.conftest import chat_rows, write_rows
from tests.training.test_loop import cut_off

OPTIONS = {"pairs": "pairs", "eval_pairs": "heldout", "batch_size": 5, "lr": 1e-3}


def sweep(cache: str, output: Path, **options: Any) -> SweepReport:
    return dpo_cache.sweep(cache, output, log=lambda _: None, **{**OPTIONS, **options})


def test_a_grid_is_trained_once_and_compared(cache: str, tmp_path: Path, started: list[str]) -> None:
    grid = {"beta": [0.05, 0.5], "loss": "sigmoid:0.8+sft:0.2,ipo"}
    reports: list[SweepReport] = []
    seen: list[SweepProgress] = []
    report = sweep(cache, tmp_path / "all", **grid, on_run=reports.append, on_progress=seen.append)
    assert started == [
        f"beta={beta},loss={loss}" for beta in (0.05, 0.5) for loss in ("sigmoid-0.8+sft-0.2", "ipo")
    ]
    assert report.finished and report.num_failed == 0
    assert [(one.num_finished, len(one.rows)) for one in reports] == [(1, 4), (2, 4), (3, 4)]
    assert (seen[-1].num_done, seen[-1].done, seen[-1].seconds_left) == (4, 4, seen[-1].seconds_left)

    alone = dpo_cache.train(cache, tmp_path / "alone", log=lambda _: None, **OPTIONS, beta=0.5, loss=("ipo",))
    run = tmp_path / "all" / "beta=0.5,loss=ipo"
    assert (run / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model" / "model.safetensors"
    ).read_bytes()
    row = next(row for row in report.rows if row.name == run.name)
    assert alone.eval_before and alone.eval_after
    assert (row.accuracy_before, row.accuracy) == (
        alone.eval_before["eval/rewards/accuracies"],
        alone.eval_after["eval/rewards/accuracies"],
    )
    assert (row.mean_loss, row.num_steps, row.total_steps) == (alone.eval_after["eval/loss"], 3, 3)

    accuracies = [row.accuracy for row in report.rows]
    assert accuracies == sorted(accuracies, reverse=True)  # type: ignore[type-var]
    with open(tmp_path / "all" / "table.csv") as file:
        assert [line["name"] for line in csv.DictReader(file)] == [row.name for row in report.rows]
    assert report.rows[0].name.split("loss=")[1].split("-")[0] in (tmp_path / "all" / "table.md").read_text()

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("model/*")}
    again = sweep(cache, tmp_path / "all", **grid, resume=True)
    assert again.rows == report.rows and len(started) == 4
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("model/*")} == files

    wider = sweep(cache, tmp_path / "all", **{**grid, "beta": [0.05, 0.5, 0.1]})
    assert (
        wider.finished
        and wider.num_runs == 6
        and started[4:] == ["beta=0.1,loss=sigmoid-0.8+sft-0.2", "beta=0.1,loss=ipo"]
    )


def test_the_others_continue_after_a_failure_and_it_is_tried_again(
    cache: str, tmp_path: Path, started: list[str]
) -> None:
    said: list[str] = []
    grid = {**OPTIONS, "loss": "ipo", "beta": [1e-30, 0.1]}
    report = dpo_cache.sweep(cache, tmp_path / "out", log=said.append, **grid)
    assert (report.num_finished, report.num_failed, report.finished) == (1, 1, False)
    failed = report.rows[-1]
    assert (failed.name, failed.state) == ("beta=1e-30", "failed")
    assert (
        failed.error
        and failed.error.startswith("step 1: loss 2")
        and failed.error.endswith("The weights were not updated. Lower --lr.")
    )
    assert (
        "beta=1e-30: failed with exit code 1; the others continue. Log: "
        f"{tmp_path}/out/logs/beta=1e-30.log" in said
    )
    assert (
        (tmp_path / "out" / "logs" / "beta=1e-30.log")
        .read_text()
        .startswith(f"$ dpo-cache train --cache={cache} ")
    )
    assert f"- beta=1e-30 failed: {failed.error}" in (tmp_path / "out" / "table.md").read_text()
    dpo_cache.sweep(cache, tmp_path / "out", log=said.append, **grid)
    assert started == ["beta=1e-30", "beta=0.1", "beta=1e-30"]


def test_a_stop_begins_nothing_more_and_the_rest_is_done_later(
    cache: str, tmp_path: Path, started: list[str]
) -> None:
    stopped = sweep(cache, tmp_path / "out", beta=[0.1, 0.2], should_stop=lambda: bool(started))
    assert started == ["beta=0.1"] and [row.state for row in stopped.rows] == ["finished", "waiting"]
    assert sweep(cache, tmp_path / "out", beta=[0.1, 0.2]).finished and started == ["beta=0.1", "beta=0.2"]


def test_a_run_that_was_stopped_is_resumed(cache: str, tmp_path: Path, started: list[str]) -> None:
    output = tmp_path / "out"
    steps: list[int] = []
    dpo_cache.train(
        cache,
        output / "beta=0.1",
        log=lambda _: None,
        **OPTIONS,
        beta=0.1,
        on_metrics=lambda line: steps.append(line["step"]),
        should_stop=lambda: True,
    )
    assert max(steps) == 1 and (output / "beta=0.1" / "checkpoints").exists()
    (output / "beta=0.1").rename(tmp_path / "kept")
    output.rmdir()
    sweep(cache, output, beta=[0.1, 0.2], should_stop=lambda: True)  # the plan alone
    (tmp_path / "kept").rename(output / "beta=0.1")
    report = sweep(cache, output, beta=[0.1, 0.2])
    assert report.finished and "--resume" in (output / "logs" / "beta=0.1.log").read_text()
    lines = [json.loads(line) for line in (output / "beta=0.1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


def test_errors_of_every_run_are_raised_before_any_starts(
    cache: str, tmp_path: Path, started: list[str]
) -> None:
    for options, message in (
        ({"pairs": "nope,pairs"}, "no pair set 'nope'"),
        ({"reference": "zz"}, "no reference whose id starts with 'zz'"),
        (
            {"pairs": None, "eval_pairs": None},
            "several pair sets to train on.\nName one with `pairs`: heldout/train, pairs/train.",
        ),
    ):
        with pytest.raises(NotInCacheError) as caught:
            sweep(cache, tmp_path / "out", **{"beta": [0.1, 0.2], **options})
        assert message in str(caught.value)
    with pytest.raises(OptionError, match="the accuracy on evaluation pairs, and there are none"):
        sweep(cache, tmp_path / "out", beta=[0.1, 0.2], eval_pairs=None, plot=tmp_path / "plot.svg")
    assert not started and not (tmp_path / "out").exists()


def test_a_sweep_in_several_processes_is_refused(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="a launcher has started 2 processes, and each run of a sweep"):
        sweep(cache, tmp_path / "all", beta=[0.05, 0.5])
    assert not (tmp_path / "all").exists()


def test_a_note_names_pairs_that_changed_between_the_runs(
    model_folder: str, tmp_path: Path, started: list[str]
) -> None:
    where = str(tmp_path / "cache")
    options = {"pairs": "pairs", "eval_pairs": None, "eval_fraction": 0.4, "max_steps": 1}
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(9)), where)
    assert not any(
        "has changed" in note for note in sweep(where, tmp_path / "out", beta=[0.1], **options).notes
    )
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(12)), where)
    report = sweep(where, tmp_path / "out", beta=[0.1, 0.2], **options)
    assert (
        "pairs/train has changed between the runs: they were not trained on the same pairs." in report.notes
    )
    assert "has changed between" in (tmp_path / "out" / "table.md").read_text()


class FakeProcess:
    code: int | None = None

    def poll(self) -> int | None:
        return self.code


@pytest.fixture
def active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ActiveRun:
    """A run of 10 steps that writes what a test lets it write."""
    monkeypatch.setattr(processes, "start_process", lambda *_: FakeProcess())
    monkeypatch.setattr(processes, "swept_fields", list)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"resolved": {"total_steps": 10}}')
    return ActiveRun(
        "cache", Run("run", tmp_path / "run", tmp_path / "logs" / "run.log", {}, {}), 0, {}, None
    )


def test_the_time_left_is_that_of_the_pace_seen(active: ActiveRun, monkeypatch: pytest.MonkeyPatch) -> None:
    now = active.started
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def write(number: int) -> None:
        with open(active.run.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": number, "loss": 1.0, "num_pairs": 4, "pairs_per_s": 2.0}) + "\n")

    assert active.poll(print) is None and active.seconds_left is None
    now += 5  # it starts
    write(1)
    active.poll(print)
    assert active.seconds_left == 9 * 2.0  # by the step's own time
    now += 6
    write(2)
    write(3)
    active.poll(print)
    assert active.seconds_left == 7 * 3.0  # by the time between the steps
    assert active.seconds_in_all == 5 + 6 + 21
    with open(active.run.folder / "metrics.jsonl", "a") as file:
        file.write('damaged\n[1]\n{"loss": 1}\n')
    write(4)
    active.poll(print)
    assert active.last_line and active.last_line["step"] == 4


@pytest.mark.parametrize(
    ("code", "said", "error"),
    [
        (-signal.SIGKILL, "some words\n", "killed by SIGKILL (out of memory?)"),
        (-signal.SIGSEGV, "", "killed by SIGSEGV"),
        (1, "a remark\nerror: it is so.\nDo this.\n", "it is so. Do this."),
        (1, "Traceback:\n  File x\nKeyError: 'y'\n", "KeyError: 'y'"),
        (3, "", "ended with exit code 3 without any output"),
    ],
)
def test_the_error_of_a_run(active: ActiveRun, code: int, said: str, error: str) -> None:
    with open(active.run.log, "a") as file:
        file.write(said)
    active.process.code = code  # type: ignore[attr-defined]
    heard: list[str] = []
    assert active.poll(lambda name, line: heard.append(f"{name}: {line}")) == code
    assert heard == [f"run: {line}" for line in said.splitlines()]
    assert active.error(code) == error


def test_parallel_runs_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert (
        "OMP_NUM_THREADS" not in run_environment(1, 0)
        and run_environment(1, 0)["CUDA_VISIBLE_DEVICES"] == "2,5"
    )
    shared = [run_environment(3, slot) for slot in range(3)]
    assert [environment["OMP_NUM_THREADS"] for environment in shared] == ["2"] * 3
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in shared] == ["2", "5", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_environment(3, 0)["OMP_NUM_THREADS"] == "5"


def test_a_run_that_was_killed_after_its_first_best_does_not_stop_the_sweep_for_ever(
    cache: str, tmp_path: Path, started: list[str]
) -> None:
    output, options = (
        tmp_path / "out",
        {"beta": [0.1, 0.2], "eval_every": 1, "epochs": 2.0, "step_zero": "off"},
    )
    sweep(cache, output, **options, should_stop=lambda: True)  # only the plan
    cut_off(
        cache,
        output / "beta=0.1",
        4,
        **{**OPTIONS, "beta": 0.1, "eval_every": 1, "epochs": 2.0, "step_zero": "off"},
    )
    assert (output / "beta=0.1/best").exists() and not (output / "beta=0.1/checkpoints").exists()
    (output / "beta=0.2").mkdir()  # killed before it wrote its config
    (output / "beta=0.2/.claim.tmp").touch()
    assert sweep(cache, output, **options).finished and started == ["beta=0.1", "beta=0.2"]
    (output / "beta=0.1/checkpoints/step-000002").mkdir(parents=True)  # killed after it had published model/
    remarks: list[str] = []
    assert dpo_cache.sweep(cache, output, log=remarks.append, **OPTIONS, **options).finished
    assert "beta=0.1: it was killed during its clean-up; checkpoints removed." in remarks
    assert not (output / "beta=0.1/checkpoints").exists()


# -- mistakes that would make every run fail -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 2, "lora_targets": ["q_proj", "nosuch"]}, "no layer called nosuch"),
        ({"lora_r": 2, "merge_adapter": [False, True], "lora_targets": "nosuch"}, "no layer called nosuch"),
        ({"merge_adapter": True, "beta": [0.1, 0.2]}, "`merge_adapter` needs an adapter"),
        ({"router_aux_loss_coef": [0.0, 0.1]}, "LlamaForCausalLM returns no router logits"),
        ({"chat_template": ["pairs", "none.jinja"]}, "`chat_template` none.jinja: not readable"),
        ({"peft_config": "none.json", "beta": [0.1, 0.2]}, "`peft_config` none.json: no PEFT config"),
        ({"pairs": ["pairs", "other"]}, "no pair set 'other'"),
    ],
)
def test_what_a_run_would_fail_on_is_found_before_any_run_starts(
    cache: str, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(DpoCacheError, match=message):
        dpo_cache.sweep(cache, tmp_path / "sweep", **{"pairs": "pairs", **options})
    assert not (tmp_path / "sweep").exists()
