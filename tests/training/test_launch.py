import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_cache.errors import OptionError
from dpo_cache.training import launch
from dpo_cache.training.launch import LaunchedRank, launched_rank, reports_early_errors

SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCH, LaunchedRank(3, 4, 1, 2)),
        (SLURM, LaunchedRank(5, 8, 1, 4)),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,5"}, LaunchedRank(5, 8, 1, 3)),
        (OPEN_MPI, LaunchedRank(1, 2, 0, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, LaunchedRank(1, 2, 1, 1)),
        # one torchrun in each task of a SLURM step
        ({**SLURM, **TORCH}, LaunchedRank(3, 4, 1, 2)),
        # the script of a SLURM job, which starts no step
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "first", "WORLD_SIZE": "2"}, None),
    ],
)
def test_the_rank_that_a_launcher_gives(environment: dict[str, str], expected: LaunchedRank | None) -> None:
    assert launched_rank(environment) == expected


@pytest.mark.parametrize(
    ("index", "local_index", "reports"), [(0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)]
)
def test_one_process_of_a_machine_reports_early_errors(
    index: int, local_index: int, reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(launch.VARIABLES[0], (index, 4, local_index, 2), strict=True):
        monkeypatch.setenv(name, str(value))
    assert reports_early_errors() == reports and launch.is_quiet_rank() == (index > 0)


def test_another_number_of_processes_than_a_launcher_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.LAUNCHER, raising=False)
    for name, value in TORCH.items():
        monkeypatch.setenv(name, value)
    given = {"cache": "cache", "output": "run", "launch": 2}
    with pytest.raises(OptionError, match="`launch` 2: a launcher has started 4 processes already"):
        launch.with_launched_config(given, print)
    same = {**given, "launch": 4}
    assert launch.with_launched_config(same, print) == same
    monkeypatch.setenv(launch.LAUNCHER, "1")  # a process of `launch`, whose arguments it gets
    assert launch.with_launched_config(given, print) == given


def program(tmp_path: Path, code: str) -> str:
    """A package `dpo_cache` whose command line is this code, for processes that `launch` starts."""
    (tmp_path / "dpo_cache").mkdir()
    (tmp_path / "dpo_cache" / "__init__.py").write_text("")
    (tmp_path / "dpo_cache" / "__main__.py").write_text(f"import os, signal, sys, time\n{code}\n")
    return str(tmp_path)


RANK = "rank = int(os.environ['RANK'])\n"


@pytest.mark.parametrize(
    ("code", "expected", "remark"),
    [
        ("", 0, ""),
        ("sys.exit(2 if rank == 1 else 0)", 2, ""),
        ("os.kill(os.getpid(), 9) if rank == 2 else sys.exit(1)", 1, ""),
        ("if rank == 1: os.kill(os.getpid(), 9)", 1, "error: rank 1 was ended by SIGKILL.\n"),
    ],
)
def test_the_exit_code_is_that_of_the_ranks(
    code: str, expected: int, remark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("PYTHONPATH", program(tmp_path, RANK + code))
    monkeypatch.chdir(tmp_path)
    assert launch.launch(3, []) == expected
    assert capsys.readouterr().err == remark


def test_ranks_that_do_not_end_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", program(tmp_path, RANK + "sys.exit(3) if rank else time.sleep(1000)"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "END_S", 0.1)
    assert launch.launch(2, []) == 3


def test_each_rank_gets_its_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    names = (*launch.VARIABLES[0], "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
    code = f"print(*(os.environ[name] for name in {names!r}), *sys.argv[1:])"
    monkeypatch.setenv("PYTHONPATH", program(tmp_path, code))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.chdir(tmp_path)
    assert launch.launch(2, ["train", "--lr", "1"]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        f"{index} 2 {index} 2 {launch.LOOPBACK} 7 train --lr 1" for index in range(2)
    ]


def test_a_signal_is_passed_on_once(tmp_path: Path) -> None:
    code = """
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
open(f"ready-{os.environ['RANK']}", "w").close()
while not os.path.exists("go"):
    time.sleep(0.01)
sys.exit(100 + len(got))
"""
    place = program(tmp_path, code)
    here = str(Path(launch.__file__).parents[2])
    script = (
        f"import sys, os\nsys.path.insert(0, {here!r})\nfrom dpo_cache.training.launch import launch\n"
        f"os.environ['PYTHONPATH'] = {place!r}\nsys.exit(launch(2, []))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    while not all((tmp_path / f"ready-{index}").exists() for index in range(2)):
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGINT)
    (tmp_path / "go").touch()
    assert parent.wait(60) == 101


def test_accelerate_that_starts_one_process_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launch.unused_settings("ddp") == []
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launch.unused_settings("ddp") == [
        "accelerate has started one process, as it does on CPUs without MPI. `launch` N starts N of them."
    ]
    for name, value in TORCH.items():
        monkeypatch.setenv(name, value)
    assert launch.unused_settings("ddp") == []


@pytest.mark.parametrize(
    ("variable", "value", "parallel", "expected"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", "ddp", []),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "ddp", ["mixed_precision bf16 of accelerate has no effect: `precision` decides."]),
        ("ACCELERATE_USE_FSDP", "true", "fsdp", []),
        ("ACCELERATE_USE_FSDP", "true", "ddp", ["use_fsdp true of accelerate has no effect: `parallel` decides."]),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "ddp", ["gradient_accumulation_steps 4 of accelerate has no effect: `batch_size` counts the pairs of all processes."]),
    ],
)  # fmt: skip
def test_settings_of_accelerate_that_have_no_effect(
    variable: str, value: str, parallel: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert launch.unused_settings(parallel) == expected
