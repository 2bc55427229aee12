"""How a process joins others; runs of several ranks are in tests/scale."""

import os
from pathlib import Path

import pytest

from dpo_cache.errors import OptionError
from dpo_cache.training import distributed
from dpo_cache.training.launch import VARIABLES, LaunchedRank
from tests import programs


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("node7,node8", "node7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("login1,gpu[07-09]", "login1"),
        ("rack-a[1-2].example", "rack-a1.example"),
    ],
)
def test_the_first_node_of_a_list_of_slurm(nodes: str, first: str) -> None:
    assert distributed.first_node(nodes) == first


def test_variables_of_slurm_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES[0], "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is removed after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[07-08]")
    distributed._complete_environment(LaunchedRank(5, 8, 1, 4))
    names = (*VARIABLES[0], "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "4", "gpu07", "24711"]


def test_variables_that_a_launcher_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "5", "MASTER_ADDR": "node3", "MASTER_PORT": "29400", "SLURM_JOB_ID": "4711"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for name in VARIABLES[0][1:]:
        monkeypatch.setenv(name, "1")
    distributed._complete_environment(LaunchedRank(5, 8, 1, 4))
    assert {name: os.environ[name] for name in given} == given


def join(tmp_path: Path, device: str, **variables: str) -> programs.Done:
    """The second of two ranks, of which the first never comes."""
    rank = dict(zip(VARIABLES[0], ("1", "2", "1", "2"), strict=True))
    place = {"DPO_CACHE_RENDEZVOUS": f"file://{tmp_path / 'ranks'}", "DPO_CACHE_RANK_TIMEOUT": "1"}
    script = f"""
import os
os.environ.update({ {**rank, **place, **variables}!r})
from dpo_cache.errors import DpoCacheError
from dpo_cache.training.distributed import joined_ranks
try:
    with joined_ranks({device!r}):
        pass
except DpoCacheError as error:
    print(type(error).__name__, error, error.rank)
"""
    return programs.run(script=script)


def test_a_rank_whose_others_do_not_come(tmp_path: Path) -> None:
    done = join(tmp_path, "cpu")
    first, second = done.out.splitlines()
    assert first.startswith("TrainingError rank 1: the 2 ranks could not connect to each other ("), done
    assert second.startswith(
        "Check that all were started, and that MASTER_ADDR and MASTER_PORT are those of the first one. "
    )


def test_the_time_that_ranks_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPO_CACHE_RANK_TIMEOUT", raising=False)
    assert distributed.timeout_s() == 1800
    monkeypatch.setenv("DPO_CACHE_RANK_TIMEOUT", "0.5")
    assert distributed.timeout_s() == 0.5
    for wrong in ("0", "soon", "inf", "", "1e300", "nan"):
        monkeypatch.setenv("DPO_CACHE_RANK_TIMEOUT", wrong)
        with pytest.raises(OptionError) as error:
            distributed.timeout_s()
        assert str(error.value) == f"DPO_CACHE_RANK_TIMEOUT={wrong}: expected seconds, a number above 0."


@pytest.mark.parametrize(
    ("device", "variables", "expected"),
    [
        ("mps", {}, "OptionError `device` mps: several ranks train on CUDA devices, or on CPUs. None\n"),
        (
            "cpu",
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "OptionError accelerate is configured for DeepSpeed, which this training loop does not use.\n"
            "Configure it for several GPUs only, and shard with `parallel` fsdp. None\n",
        ),
    ],
)
def test_what_several_ranks_cannot_use(
    device: str, variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    assert join(tmp_path, device, **variables).out == expected
