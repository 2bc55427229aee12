"""Promise 11: a training run that is killed at any operation on its files goes on, to the same bits and lines.

`resume` continues it, starts it again or says that it is finished; where it has not begun, the same command
does. At the end nothing is left over.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dpo_cache
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.promises.killed_runs import KilledRuns
from tests.promises.test_7_failing_disks import can_mount

pytestmark = pytest.mark.skipif(os.name == "nt", reason="runs are forked")

# The best evaluations are those of steps 1 and 3, the checkpoints those of steps 2 and 4: when the second best is
# saved, the first is the one that the checkpoint names.
EVALUATED = {
    "eval_pairs": "heldout", "eval_every": 1, "batch_size": 2, "lr": 1e-2, "epochs": 9.0, "max_steps": 6,
    "save_every": 2, "sample": 1, "deterministic": True, "step_zero": "off", "losses": [9, 5, 6, 4, 5, 6, 7],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "patience": {**EVALUATED, "patience": 2},
    "last policy": {**EVALUATED, "keep": 2},
    "last is best": {**EVALUATED, "losses": [9, 5, 6, 4, 5, 6, 3]},
    "merged adapter": {**EVALUATED, "patience": 2, "lora_r": 2, "merge_adapter": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledRuns]:
    folder = tmp_path_factory.mktemp("killed")
    fields = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }
    make_llama(**fields).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("pairs", chat_rows(9)), ("heldout", chat_rows(4, seed=9))):
        data = write_rows(folder / f"{name}.jsonl", rows)
        dpo_cache.precompute(folder / "model", data, folder / "cache", max_length=96)
    process = KilledRuns(str(folder / "cache"), folder)
    yield process
    process.close()


def content_of(run: Path) -> dict[str, Any]:
    """Every file of a run, without what depends on the clock, and without `resume`."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        if path.is_dir():
            found[str(path.relative_to(run))] = "a folder"
        elif path.name == "metrics.jsonl":
            found[path.name] = [
                {
                    name: value
                    for name, value in json.loads(line).items()
                    if name not in ("pairs_per_s", "peak_bytes")
                }
                for line in path.read_text().splitlines()
            ]
        elif path.name == "config.json" and path.parent == run:
            found[path.name] = {**json.loads(path.read_text()), "resume": None, "output": None}
        else:
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def go_on(runs: KilledRuns, output: Path, options: dict[str, Any]) -> str:
    """Resume a run that was killed, or give the same command; returns what that did."""
    code, result = runs.run(output, options, resume=True)
    if code == 0:
        return "started again" if "starts again" in " ".join(result["remarks"]) else "resumed"
    if "this run is finished" in result["error"]:
        return "finished before"
    assert "there is no run to resume" in result["error"]
    code, result = runs.run(output, options)
    assert code == 0, result
    return "begun"


@pytest.mark.parametrize(
    ("kind", "every"),
    [("patience", 89), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_11_a_run_that_is_killed_at_any_file_operation_ends_with_the_same_bits(
    runs: KilledRuns, tmp_path: Path, kind: str, every: int
) -> None:
    options = KINDS[kind]
    code, result = runs.run(tmp_path / "whole", options)
    assert code == 0, result
    operations, expected = result["operations"], content_of(tmp_path / "whole")
    assert ".claim.tmp" not in expected and "checkpoints" not in expected
    outcomes: dict[str, int] = {}
    differing: list[str] = []
    for die_at in range(1, len(operations) + 1, every):
        output = tmp_path / f"cut{die_at}" / "whole"  # the model card has the folder's name
        code, result = runs.run(output, options, die_at=die_at)
        assert code == -9, result
        outcome = go_on(runs, output, options)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if content_of(output) != expected:
            differing.append(f"{die_at}: {operations[die_at - 1]}")
    print(f"{kind}: {len(operations)} operations, {sum(outcomes.values())} kills: {outcomes}")
    assert differing == []
    assert set(outcomes) >= {"begun", "started again", "resumed"}
    assert every > 1 or "finished before" in outcomes


SWEPT = {**EVALUATED, "max_steps": 3, "beta": [0.1, 0.2]}


def content_of_sweep(folder: Path) -> dict[str, Any]:
    """The files of its runs, and the names of all others: tables and logs have times."""
    content = {path.name: content_of(path) for path in folder.iterdir() if path.name.startswith("beta")}
    return {**content, "names": sorted(str(path.relative_to(folder)) for path in folder.glob("*"))}


@pytest.mark.parametrize("every", [167, pytest.param(3, marks=pytest.mark.slow)])
def test_11_a_sweep_that_is_killed_at_any_file_operation_ends_with_the_same_runs(
    runs: KilledRuns, tmp_path: Path, every: int
) -> None:
    code, result = runs.run(tmp_path / "whole", SWEPT)
    assert code == 0, result
    operations, expected = result["operations"], content_of_sweep(tmp_path / "whole")
    assert expected["names"] == ["beta=0.1", "beta=0.2", "logs", "sweep.json", "table.csv", "table.md"]
    differing: list[str] = []
    places = range(1, len(operations) + 1, every)
    for die_at in places:
        output = tmp_path / f"cut{die_at}"
        code, result = runs.run(output, SWEPT, die_at=die_at)
        assert code == -9, result
        code, result = runs.run(output, SWEPT)  # the same command
        assert code == 0, (operations[die_at - 1], result)
        if content_of_sweep(output) != expected:
            differing.append(f"{die_at}: {operations[die_at - 1]}")
    print(f"sweep: {len(operations)} operations, {len(places)} kills")
    assert differing == []


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here")
def test_11_a_run_on_a_disk_that_becomes_full_at_any_place_goes_on_once_it_has_room(
    runs: KilledRuns, tmp_path: Path
) -> None:
    command = [
        "unshare",
        "-rm",
        sys.executable,
        "-m",
        "tests.promises.small_disks",
        runs.cache,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "KiB suffice; refused: step-000001 model" in done.stdout, done.stderr
