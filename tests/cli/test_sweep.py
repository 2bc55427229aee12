"""`dpo-cache sweep` as a user sees it: its errors, and runs in other processes."""

import json
import os
import signal
from pathlib import Path

import pytest

from dpo_cache.cli.sweep import _print_report
from dpo_cache.reporting.runs import RunRow
from dpo_cache.sweeping.run import SweepReport
from tests import programs
from tests.cli.test_commands import run  # noqa: F401
from tests.sweeping.conftest import cache, started  # noqa: F401
from tests.waiting import wait_until

OPTIONS = ["--pairs", "pairs", "--eval-pairs", "heldout", "--batch-size", "2", "--lr", "1e-3"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--loss", "sigmoid:0.8", "--loss", "sft:0.2"],
            2,
            "--loss is given 2 times.\n"
            "Join the parts of one value with +, and values with commas: --loss a+b,c.",
        ),
        (["--beta", "0.1,x"], 2, "--beta x: expected a number."),
        (["--jobs", "0"], 2, "--jobs 0: expected a whole number above 0."),
        (["--resume"], 1, "{output}: there is no sweep to resume.\nRun without --resume to start one."),
        (["--pairs", "nope"], 1, "{cache}: no pair set 'nope'.\nIt holds: heldout/train, pairs/train."),
    ],
)
def test_errors(run, cache: str, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    output = tmp_path / "out"
    done = run("sweep", "--cache", cache, "--output", output, *OPTIONS, *arguments)
    assert (done.code, done.out, done.err) == (
        code,
        "",
        f"error: {message.format(output=output, cache=cache)}\n",
    )
    assert not output.exists()


def test_the_result_is_one_table(run, cache: str, tmp_path: Path, started: list[str]) -> None:
    command = [
        "sweep",
        "--cache",
        cache,
        "--output",
        tmp_path / "out",
        *OPTIONS,
        "--max-steps",
        1,
        "--shuffle",
        "--no-shuffle",
    ]
    done = run(*command)
    assert done.code == 0 and started == ["shuffle=on", "shuffle=off"]
    title, columns, *rest = done.out.splitlines()
    assert title.startswith(f"{tmp_path}/out: 2 of 2 runs finished, in ")
    assert " ".join(columns.split()) == "shuffle steps accuracy margin mean loss time s state"
    assert [line.split()[0] for line in rest[:2]] == [
        started_name.removeprefix("shuffle=") for started_name in sorted_by_table(tmp_path / "out")
    ]
    assert rest[-1].startswith("Next, with the best: AutoModelForCausalLM.from_pretrained(") or (
        rest[2].startswith("The best tie: shuffle=on and shuffle=off have an accuracy of ")
        and rest[-1].startswith("Next, with the first of the best: AutoModelForCausalLM.from_pretrained(")
    )
    assert "2 runs: 2 to start.\n" in done.err and "shuffle=on: eval at step 0: " in done.err
    ended = [line for line in done.err.splitlines() if " finished: " in line]
    assert len(ended) == 1 and ended[0].startswith(
        "shuffle=on finished: held out: loss 0."
    )  # the last is in the table
    assert " 1 step in " in ended[0] and ended[0].endswith("; 1 of 2 runs finished.")
    assert "steps accuracy" not in " ".join(done.err.split())  # the table is printed once
    # both start from the same model, which is said once
    assert done.err.count("the policy starts from ") == 1
    whole = run(*command, "--verbose").out
    assert "before" in whole and "time s is that of the training steps" in whole
    told = json.loads(run(*command, "--json").out)
    assert told["finished"] is True and told["rows"][0]["options"] in ({"shuffle": True}, {"shuffle": False})


def test_the_best_model_is_loaded_by_its_own_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"resolved": {"auto_class": "AutoModelForImageTextToText"}}')
    numbers = dict.fromkeys(("accuracy_before", "accuracy", "margin", "mean_loss", "chosen_reward"), 0.5)
    others = dict.fromkeys(("rejected_reward", "pairs_per_s", "peak_bytes", "steps_s"))
    row = RunRow("b", {}, "finished", 1, 1, "held out", **numbers, **others)
    _print_report(SweepReport(str(tmp_path), 1, 1, 0, [row], [], "table.md", 1.0, best=["b"]))
    assert f'AutoModelForImageTextToText.from_pretrained("{tmp_path}/b/model")' in capsys.readouterr().out


def sorted_by_table(output: Path) -> list[str]:
    return [line.split(",")[0] for line in (output / "table.csv").read_text().splitlines()[1:]]


def test_a_failed_run_makes_it_end_with_1(run, cache: str, tmp_path: Path, started: list[str]) -> None:
    done = run(
        "sweep",
        "--cache",
        cache,
        "--output",
        tmp_path / "out",
        *OPTIONS,
        "--max-steps",
        1,
        "--loss",
        "ipo",
        "--beta",
        "1e-30,0.1",
    )
    assert done.code == 1 and started == ["beta=1e-30", "beta=0.1"]
    assert done.err.endswith(
        f"error: 1 of 2 runs did not finish.\nNext: dpo-cache sweep --resume {tmp_path}/out\n"
    )
    assert "beta=1e-30 failed: step 1: loss " in done.out


def test_ctrl_c_saves_the_active_run_and_the_same_command_resumes(
    run, cache: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    output = tmp_path / "out"
    command = [
        "sweep",
        "--cache",
        cache,
        "--output",
        str(output),
        *OPTIONS,
        "--max-steps",
        "60",
        "--beta",
        "0.1,0.2",
    ]
    metrics = output / "beta=0.1" / "metrics.jsonl"
    program = programs.start(*command)
    wait_until(
        lambda: program.has_ended() or (metrics.exists() and metrics.read_text().count("\n") >= 3),
        "three lines of metrics.jsonl",
    )
    program.send_signal(signal.SIGINT)
    done = program.wait()
    text = done.out + done.err
    assert done.code == 130, text
    assert "2 runs: 2 to start.\n" in text and "0 of 2 runs finished" in text
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert [path.name for path in (metrics.parent / "checkpoints").iterdir()] == [
        f"step-{last:06d}"
    ] and last < 60
    assert not (output / "beta=0.2").exists()

    begun = request.getfixturevalue("started")  # from here on in this process
    done = run("sweep", "--resume", output)
    assert done.code == 0, done.err
    assert begun == ["beta=0.1", "beta=0.2"] and "2 runs: 1 to resume, 1 to start.\n" in done.err
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 61))


def test_a_run_that_is_killed_does_not_end_the_others(cache: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [
        "sweep",
        "--cache",
        cache,
        "--output",
        str(output),
        *OPTIONS,
        "--max-steps",
        "100,101",
        "--jobs",
        "2",
    ]
    first = output / "max_steps=100"
    program = programs.start(*command)
    wait_until(
        lambda: program.has_ended() or (first / "metrics.jsonl").exists(), "the first line of metrics.jsonl"
    )
    victims = [
        entry
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and child_of(entry, program.pid) and is_run(entry, first)
    ]
    assert len(victims) == 1
    os.kill(int(victims[0].name), signal.SIGKILL)
    done = program.wait()
    text = done.out + done.err
    assert done.code == 1, text
    assert "2 runs: 2 to start; 2 at once, each with 1 CPU thread.\n" in text
    assert (
        "max_steps=100 failed: killed by SIGKILL (out of memory?)" in text and "1 of 2 runs finished" in text
    )
    assert (output / "max_steps=101" / "model" / "config.json").exists()


def child_of(entry: Path, parent: int) -> bool:
    try:
        return f"\nPPid:\t{parent}\n" in (entry / "status").read_text()
    except OSError:  # ended meanwhile
        return False


def is_run(entry: Path, folder: Path) -> bool:
    return f"--output={folder}".encode() in (entry / "cmdline").read_bytes().split(b"\0")
