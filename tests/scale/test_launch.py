"""Whole runs of `dpo-cache train` on several ranks: how they are started, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import dpo_cache
from dpo_cache.training.launch import VARIABLES
from tests import programs
from tests.conftest import chat_rows, write_rows
from tests.scale.ranks import ENVIRONMENT
from tests.waiting import wait_until

OPTIONS = ("--batch-size", "4", "--lr", "1e-3", "--max-steps", "3", "--device", "cpu")
MAIN = "from dpo_cache.cli.app import main\nmain()\n"
AT_STEP_2 = """
import time
import torch, dpo_cache
from dpo_cache.training.ranked_step import RankedStep
accumulate, tries = RankedStep._accumulate, []
def full():
    raise torch.OutOfMemoryError("out of memory")
def faulty(self, pairs):
    tries.append(not self._reduces)
    if tries.count(False) == 2:
        exec(FAULTS.get(os.environ["RANK"], ""))
    return accumulate(self, pairs)
RankedStep._accumulate = faulty
"""
KILL = "os.kill(os.getpid(), 9)"


def at_step_2(faults: dict[int, str]) -> str:
    """Code that runs other code at the second step, on some of the ranks."""
    return f"FAULTS = { ({str(rank): code for rank, code in faults.items()})!r}\n{AT_STEP_2}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("launched")
    for name, rows in (("pairs", chat_rows(15)), ("heldout", chat_rows(6, seed=9))):
        dpo_cache.precompute(model_folder, write_rows(folder / f"{name}.jsonl", rows), folder / "cache")
    return str(folder / "cache")


@pytest.fixture(scope="module")
def alone(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    dpo_cache.train(
        cache, run, pairs="pairs", eval_pairs="heldout", batch_size=4, lr=1e-3, max_steps=3, device="cpu"
    )
    return run


def start_ranks(
    tmp_path: Path, size: int, *arguments: str, before: str = "", **variables: str
) -> list[programs.Program]:
    """The command line on several ranks, as a launcher starts it; `before` is code that runs first."""
    number = len(list(tmp_path.glob("store-*")))
    store = tmp_path / f"store-{number}"
    store.mkdir()
    started = []
    for index in range(size):
        rank = dict(zip(VARIABLES[0], map(str, (index, size, index, size)), strict=True))
        every = {**ENVIRONMENT, **rank, "DPO_CACHE_RENDEZVOUS": f"file://{store / 'ranks'}", **variables}
        script = f"import os, sys\nos.environ.update({every!r})\n{before}\n{MAIN}"
        started.append(programs.start(*arguments, script=script))
    return started


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path) -> None:
    """The same losses and norms in each line, and the files of one run."""
    for line, expected in zip(lines_of(run), lines_of(other), strict=True):
        for name in expected.keys() - {"pairs_per_s", "peak_bytes", "num_tokens"}:
            # an accuracy is None where margins are noise
            assert line[name] == expected[name] or line[name] == pytest.approx(
                expected[name], rel=1e-4, abs=1e-5
            ), name
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in other.iterdir())


def train_arguments(cache: str, run: Path) -> list[str]:
    return ["train", "--cache", cache, "--pairs", "pairs", "--output", str(run), *OPTIONS]


# -- ways to start ---------------------------------------------------------------------------------------

LAUNCHERS = {
    "launch": [sys.executable, "-m", "dpo_cache"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr",
                 "127.0.0.1", "-m", "dpo_cache"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
                   "dpo_cache"],
}  # fmt: skip


@pytest.mark.rotating(3)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one_does(launcher: str, cache: str, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*train_arguments(cache, run), "--eval-pairs", "heldout", "--json"]
    arguments += ["--launch", "2"] if launcher == "launch" else []
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *arguments],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    addresses = set()
    while process.poll() is None:
        addresses |= listening(process.pid)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert_same_run(run, alone)
    report = json.loads(out)  # printed once
    assert report["num_steps"] == 3 and report["finished"]
    assert err.count("eval at step 3") == 1
    if launcher == "launch":
        assert addresses == {"127.0.0.1"}


@pytest.mark.rotating(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_answers_and_trackers_are_written_once(parallel: str, cache: str, tmp_path: Path) -> None:
    options = {"eval_pairs": "heldout", "eval_every": 2, "sample": 2, "log_to": ["tensorboard"]}
    given = {"pairs": "pairs", "batch_size": 4, "lr": 1e-3, "max_steps": 3, "device": "cpu"}
    dpo_cache.train(cache, tmp_path / "alone", **given, **options)
    flags = ["--eval-pairs", "heldout", "--eval-every", "2", "--sample", "2", "--log-to", "tensorboard"]
    arguments = [*train_arguments(cache, tmp_path / "run"), *flags, "--parallel", parallel]
    ends = end_of(start_ranks(tmp_path, 2, *arguments))
    assert [end.code for end in ends] == [0, 0], ends
    assert not ends[1].out and not remarks_of(ends[1])
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    found, expected = (
        [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        for name in ("run", "alone")
    )
    names = ("step", "row", "prompt", "chosen")
    assert [[line[name] for name in names] for line in found] == [
        [line[name] for name in names] for line in expected
    ]
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.*"))) == 1


def listening(pid: int) -> set[str]:
    """The addresses at which the process and those it has started listen."""
    found = set()
    try:
        started = psutil.Process(pid).children(recursive=True)
        for process in [psutil.Process(pid), *started]:
            found |= {
                one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN
            }
    except psutil.NoSuchProcess:
        pass
    return found


# -- ways to end -----------------------------------------------------------------------------------------


def end_of(ranks: list[programs.Program], limit_s: float = 60.0) -> list[programs.Done]:
    """How each rank has ended; the time-out of the process group would be longer."""
    return [rank.wait(limit_s) for rank in ranks]


def remarks_of(end: programs.Done) -> list[str]:
    """What the rank has written to stderr, without the log of torch: these processes imported it long before."""
    return [line for line in end.err.splitlines() if not line.startswith("[rank")]


def errors_of(ends: list[programs.Done]) -> list[str]:
    """The lines of errors that all ranks have written."""
    return [
        line for end in ends for line in end.err.splitlines() if line.startswith(("error: ", "Traceback"))
    ]


def test_a_killed_rank_ends_all_and_more_ranks_continue(cache: str, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*train_arguments(cache, run), "--eval-pairs", "heldout", "--save-every", "1"]
    fault = at_step_2({1: KILL})
    killed = end_of(start_ranks(tmp_path, 2, *arguments, before=fault))
    assert [end.code for end in killed] == [1, -9]
    (error,) = errors_of(killed)
    assert error.startswith("error: rank 1, process ") and "ended without reporting an error" in error
    resumed = end_of(start_ranks(tmp_path, 3, "train", "--resume", str(run)))
    assert [end.code for end in resumed] == [0, 0, 0], resumed
    assert_same_run(run, alone)


def test_the_main_rank_is_killed(cache: str, tmp_path: Path) -> None:
    fault = at_step_2({0: KILL})
    killed = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, tmp_path / "run"), before=fault))
    assert [end.code for end in killed] == [-9, 1]
    assert len(errors_of(killed)) == 1 and "rank 0, process " in killed[1].err


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("raise dpo_cache.ModelError('a problem')", "error: rank 1: a problem"),
        ("raise KeyError('a mistake')", "Traceback (most recent call last):"),
        ("raise torch.OutOfMemoryError('out of memory')", "error: rank 1: out of memory on rank 1, in a run that "
         "needs all ranks at once, so none can repeat it."),
        ("self._apply = full", "error: rank 1: out of memory on rank 1, in a run that needs all ranks at once, so none "
         "can repeat it."),
    ],
    ids=["error", "mistake", "memory", "memory-in-update"],
)  # fmt: skip
def test_an_error_of_one_rank_is_reported_once(fault: str, expected: str, cache: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = at_step_2({1: fault})
    ends = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, run), before=before))
    assert [end.code for end in ends] == [1, 1]
    assert errors_of(ends) == [expected], ends


def test_a_rank_that_waits_in_a_library_is_ended(cache: str, tmp_path: Path) -> None:
    before = "from dpo_cache.training import watch\nwatch.END_S = 1.0\n"
    before += at_step_2({0: "time.sleep(1000)", 1: "raise dpo_cache.DataError('no')"})
    ends = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, tmp_path / "run"), before=before))
    assert [end.code for end in ends] == [1, 1] and errors_of(ends) == ["error: rank 1: no"]


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        (["--pairs", "nothing"], 1, "error: "),  # of all ranks, when they have joined
        (["--lr", "-1"], 2, "error: --lr -1.0: expected a number above 0."),  # before
        (["--optimizer", "adafactor", "--parallel", "fsdp"], 2, "error: --optimizer adafactor and --parallel fsdp"),
    ],
    ids=["data", "usage", "combination"],
)  # fmt: skip
def test_an_error_of_all_ranks_is_reported_once(
    change: list[str], code: int, expected: str, cache: str, tmp_path: Path
) -> None:
    ends = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, tmp_path / "run"), *change))
    assert [end.code for end in ends] == [code, code]
    (error,) = errors_of(ends)
    assert error.startswith(expected)
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_exchange_values_report_it_once(cache: str, tmp_path: Path) -> None:
    before = """
from torch import distributed
def fail(**_):
    raise RuntimeError("no network")
distributed.new_group = fail
"""
    ends = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, tmp_path / "run"), before=before))
    assert [end.code for end in ends] == [1, 1]
    (error,) = errors_of(ends)
    assert error == "error: rank 0: the 2 ranks could not connect to each other (no network)."
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_options_do_not_train_together(cache: str, tmp_path: Path) -> None:
    before = "sys.argv += ['--seed', os.environ['RANK']]\n"
    ends = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, tmp_path / "run"), before=before))
    assert [end.code for end in ends] == [2, 2]
    (error,) = errors_of(ends)
    assert error.startswith("error: rank 1: --seed 1 here, and 0 on rank 0: ")


def test_ctrl_c_saves_the_step_and_one_process_continues(cache: str, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*train_arguments(cache, run), "--eval-pairs", "heldout"]
    before = at_step_2({0: f"os.kill(os.getpid(), {signal.SIGINT.value})"})
    ends = end_of(start_ranks(tmp_path, 2, *arguments, before=before))
    assert ends[0].code == 130 and ends[1].code == 0, ends  # only the first got the signal; both have stopped
    assert ends[0].err.count("stopping after this step") == 1 and "stopping" not in ends[1].err
    assert "stopped early" in ends[0].out and not ends[1].out
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    dpo_cache.train(resume=run)
    assert_same_run(run, alone)


@pytest.mark.rotating(2)
def test_a_run_of_one_process_continues_on_two(cache: str, alone: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", []
    dpo_cache.train(
        cache, run, pairs="pairs", eval_pairs="heldout", batch_size=4, lr=1e-3, max_steps=3, device="cpu",
        on_metrics=lambda metrics: steps.append("loss" in metrics), should_stop=lambda: steps.count(True) == 1,
    )  # fmt: skip
    assert (run / "checkpoints" / "step-000001").exists()
    resumed = end_of(start_ranks(tmp_path, 2, "train", "--resume", str(run)))
    assert [end.code for end in resumed] == [0, 0], resumed
    assert_same_run(run, alone)


def test_a_second_ctrl_c_stops_all_ranks_at_once(cache: str, tmp_path: Path) -> None:
    before = at_step_2({0: f"[os.kill(os.getpid(), {signal.SIGINT.value}) for _ in range(2)]"})
    ends = end_of(start_ranks(tmp_path, 2, *train_arguments(cache, tmp_path / "run"), before=before))
    assert [end.code for end in ends] == [130, 130], ends
    assert errors_of(ends) == []
    assert "interrupted: before the first checkpoint, so nothing is kept. Next: " in ends[0].err


@pytest.mark.rotating(2)
def test_the_processes_end_with_the_one_that_started_them(cache: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--cache", cache, "--pairs", "pairs", "--output", str(run), "--batch-size", "2"]
    arguments += ["--epochs", "100000", "--device", "cpu", "--launch", "2"]
    with started(*arguments) as launcher:
        wait_until(lambda: num_steps(run) > 1, "two steps")
        launcher.send_signal(signal.SIGINT)
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, err
    assert err.count("stopping after this step") == 1 and out.count(f"{run}: stopped early") == 1
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{num_steps(run):06d}"

    before = num_steps(run)
    with started("train", "--resume", str(run)) as launcher:
        wait_until(lambda: num_steps(run) > before, "a step")
        ranks = psutil.Process(launcher.pid).children()
        launcher.kill()
        _, err = launcher.communicate(timeout=60)  # once the ranks have closed it, too
    assert len(ranks) == 2
    wait_until(lambda: not any(rank.is_running() for rank in ranks), "the end of the ranks")
    assert err.count("error: ") == 1 and "the process that started the ranks is gone." in err


def num_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_cache", *arguments],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
