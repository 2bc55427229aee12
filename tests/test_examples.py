"""The scripts for SLURM run, and `dpo-cache` accepts the commands of the scripts and of the cluster file."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import dpo_cache
from tests.documents.accepted import parsed

ROOT = Path(dpo_cache.__file__).parents[1]
SLURM = ROOT / "examples" / "slurm"
CLUSTER = ROOT / "examples" / "ray" / "cluster.yaml"


# -- scripts for SLURM ---------------------------------------------------------------------------------

FAKES = {
    # without its options, the command runs here
    "srun": 'echo "srun $*" >> "$CALLS"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": '[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"',
    "hostname": "echo 10.0.0.7 fe80::1",
    "ray": 'echo "ray $*" >> "$CALLS"; case $1 in status) exit ${NO_RAY:-0};; esac; exit ${NO_RAY:-0}',
    "sleep": "exec /bin/sleep 0.1",
    "dpo-cache": 'echo "dpo-cache $*" >> "$CALLS"; exit ${CODE:-0}',
}
VARIABLES = {"SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture
def submit(tmp_path: Path):
    """Run a script as SLURM would on two nodes; returns its exit code, and its calls by program."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(script: str, *arguments: str, **variables: str) -> tuple[int, dict[str, list[list[str]]]]:
        calls.write_text("")
        done = subprocess.run(
            ["bash", SLURM / script, *arguments],
            env={**os.environ, **VARIABLES, "PATH": path, "CALLS": str(calls), **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        found: dict[str, list[list[str]]] = {name: [] for name in FAKES}
        for line in calls.read_text().splitlines():
            name, *words = line.split()
            found[name].append(words)
        return done.returncode, found

    return run


def test_a_job_scores_with_a_worker_on_each_gpu(submit) -> None:
    code, calls = submit("precompute.sbatch", "org/model", "pairs.jsonl", "cache", "--max-length", "2048")
    assert code == 0
    resources = ["--num-cpus=16", "--num-gpus=8", "--disable-usage-stats", "--block"]
    head = ["start", "--head", "--node-ip-address=10.0.0.7", "--port=6379", "--include-dashboard=false"]
    started = [words for words in calls["ray"] if words[0] == "start"]
    assert sorted(started) == sorted([[*head, *resources], ["start", "--address=10.0.0.7:6379", *resources]])
    joined = next(words for words in calls["srun"] if "--address=10.0.0.7:6379" in words)
    assert joined[:4] == ["--nodes=1", "--ntasks=1", "--overlap", "--exclude=gpu07"]
    (words,) = calls["dpo-cache"]
    options = parsed(words)
    assert (options.cache, options.model, options.dataset) == ("cache", "org/model", "pairs.jsonl")
    assert (options.ray, options.num_workers, options.gpus_per_worker) == ("10.0.0.7:6379", 16, 1)
    assert options.max_length == 2048


def test_a_job_ends_with_the_code_of_precompute(submit) -> None:
    assert submit("precompute.sbatch", "m", "d", "c", CODE="1")[0] == 1


def test_a_job_whose_ray_does_not_start_ends(submit) -> None:
    code, calls = submit("precompute.sbatch", "m", "d", "c", NO_RAY="1")
    assert code != 0 and calls["dpo-cache"] == []


def test_a_job_trains_and_the_next_one_continues(submit, tmp_path: Path) -> None:
    code, calls = submit("train.sbatch", "cache", "pairs", "run", "--beta", "0.2", CODE="143")
    (words,) = calls["dpo-cache"]
    options = parsed(words)
    assert code == 143 and (options.cache, options.pairs, options.output) == ("cache", "pairs", "run")
    assert (options.parallel, options.beta, options.resume) == ("fsdp", 0.2, False)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    code, calls = submit("train.sbatch", "cache", "pairs", "run", "--beta", "0.2")
    assert code == 0 and calls["dpo-cache"] == [["train", "--resume", "run"]]

    (tmp_path / "run" / "model").mkdir()
    assert submit("train.sbatch", "cache", "pairs", "run") == (0, {name: [] for name in FAKES})


def test_a_cluster_file_is_yaml_and_its_command_is_accepted() -> None:
    text = CLUSTER.read_text()
    cluster = yaml.safe_load(text)
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds and kinds["gpus"]["max_workers"] <= cluster["max_workers"]
    (shown,) = re.findall(r'"dpo-cache (.*?)"', text.replace("\n#", ""), re.S)
    options = parsed(shlex.split(shown))
    assert options.ray == "auto" and options.max_workers == 4 * cluster["max_workers"]
