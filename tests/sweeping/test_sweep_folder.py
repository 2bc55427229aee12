"""Planning a sweep in a folder: new, extended, resumed or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.options.sweep import SweepOptions
from dpo_cache.sweeping.grid import read_grid
from dpo_cache.sweeping.sweep_folder import hold_folder, plan_runs, with_plan
from tests.sweeping.test_grid import grid_of


def names(output: Path, *, resume: bool = False, **options: Any) -> list[str]:
    output.mkdir(exist_ok=True)
    return [run.name for run in plan_runs(output, "cache", grid_of(**options), resume=resume)]


def test_more_values_add_runs_and_keep_the_folders(tmp_path: Path) -> None:
    assert names(tmp_path, beta="0.1,0.2") == ["beta=0.1", "beta=0.2"]
    assert names(tmp_path, beta="0.1,0.2,0.05", resume=True) == ["beta=0.1", "beta=0.2", "beta=0.05"]
    wider = [
        "beta=0.1",
        "beta=0.1,loss=ipo",
        "beta=0.2",
        "beta=0.2,loss=ipo",
        "beta=0.05",
        "beta=0.05,loss=ipo",
    ]
    assert names(tmp_path, beta="0.1,0.2,0.05", loss="sigmoid,ipo") == wider
    assert names(tmp_path, beta="0.1,0.2,0.05", loss="sigmoid,ipo") == wider
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["runs"][0] == {"name": "beta=0.1", "options": {"beta": 0.1, "loss": ["sigmoid"]}}
    assert written["varied"] == {"beta": [0.1, 0.2, 0.05], "loss": [["sigmoid"], ["ipo"]]}


def test_another_grid_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    names(tmp_path, beta="0.1,0.2", epochs=2, lr=1e-5)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(TrainingError) as caught:
        names(tmp_path, beta="0.1,0.3", epochs=3, lr="1e-5,1e-4")
    assert str(caught.value) == (
        f"{tmp_path}: this sweep was started with other options:\n"
        "  beta: 0.1, 0.2 before, 0.1, 0.3 now\n"
        "  epochs: 2.0 before, 3.0 now\n"
        "More values add runs, but the earlier ones must be given, too. Give them, or choose another `output`."
    )
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_options_without_effect_on_results_may_change(tmp_path: Path) -> None:
    assert names(tmp_path, beta="0.1,0.2") == names(
        tmp_path, beta="0.1,0.2", budget_tokens=512, save_every="10"
    )
    with pytest.raises(TrainingError, match=r"budget_tokens: 512 before, 256, 1024 now"):
        names(tmp_path, beta="0.1,0.2", budget_tokens="256,1024", save_every="10")


def test_options_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    names(tmp_path, beta="0.1,0.2")
    plan = json.loads((tmp_path / "sweep.json").read_text())
    del plan["shared"]["seed"]
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert names(tmp_path, beta="0.1,0.2", seed="0,1") == [
        "beta=0.1",
        "beta=0.1,seed=1",
        "beta=0.2",
        "beta=0.2,seed=1",
    ]
    plan["shared"]["colour"] = "red"
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(TrainingError, match="colour: red before, unknown now"):
        names(tmp_path, beta="0.1,0.2")


PLANS = {
    "torn": ('{"format": "dpo-cac', "not readable (JSONDecodeError: "),
    "other": ('{"format": "something"}', "not readable (ValueError: not that of a sweep)"),
    "newer": (
        '{"format": "dpo-cache sweep", "version": 2, "shared": {}, "varied": {}, "runs": []}',
        "made by a newer dpo-cache (version 2",
    ),
    "elsewhere": (
        '{"format": "dpo-cache sweep", "version": 1, "shared": {}, "varied": {}, "runs": [{"name": '
        '"../x", "options": {}}]}',
        "'../x' is no name of a folder.",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, case: str) -> None:
    content, message = PLANS[case]
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(TrainingError) as caught:
        names(tmp_path, beta="0.1,0.2")
    assert str(caught.value).startswith(f"{tmp_path / 'sweep.json'}: {message}")
    assert (tmp_path / "sweep.json").read_text() == content


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(TrainingError) as caught, hold_folder(tmp_path, print):
        names(tmp_path, beta="0.1,0.2")
    assert (
        str(caught.value)
        == f"{tmp_path}: not an empty folder, nor that of a sweep; it holds notes.\nChoose another `output`."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(TrainingError, match="notes: not a folder"), hold_folder(tmp_path / "notes", print):
        raise AssertionError("not reached")


def test_there_must_be_a_sweep_to_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught, hold_folder(tmp_path / "new", print):
        names(tmp_path / "new", beta="0.1,0.2", resume=True)
    assert (
        str(caught.value)
        == f"{tmp_path / 'new'}: there is no sweep to resume.\nRun without `resume` to start one."
    )
    assert not (tmp_path / "new").exists()


def test_two_sweeps_do_not_work_in_one_folder(tmp_path: Path) -> None:
    said: list[str] = []
    with hold_folder(tmp_path, said.append) as claim:
        assert claim.descriptor is not None
        names(tmp_path, beta="0.1,0.2")
        with (
            pytest.raises(TrainingError, match="another sweep is running here"),
            hold_folder(tmp_path, said.append),
        ):
            raise AssertionError("not reached")
    with hold_folder(tmp_path, said.append):
        pass
    assert not said


def test_a_plan_of_an_earlier_version_has_the_names_of_now(tmp_path: Path) -> None:
    names(tmp_path, beta="0.1,0.2", budget_tokens="64,128")
    path = tmp_path / "sweep.json"
    path.write_text(path.read_text().replace("budget_tokens", "micro_tokens"))
    before = json.loads(path.read_text())
    found = names(tmp_path, beta="0.1,0.2", budget_tokens="64,128", resume=True)
    assert found == [run["name"] for run in before["runs"]] and found[0] == "beta=0.1,micro_tokens=64"
    assert json.loads(path.read_text())["varied"] == {"beta": [0.1, 0.2], "budget_tokens": ["64", "128"]}


def test_a_sweep_is_resumed_with_its_own_options(tmp_path: Path) -> None:
    given = {
        "beta": "0.1,0.2",
        "loss": "sigmoid:0.5+sft:0.5,ipo",
        "lora_targets": r"q_proj\,v_proj",
        "lora_r": 2,
        "shuffle": [True, False],
        "max_steps": "none,3",
    }
    grid = grid_of(**given)
    plan_runs(tmp_path, "cache", grid, resume=False)
    resumed = with_plan({"resume": tmp_path})
    assert (resumed["cache"], resumed["output"], resumed["resume"]) == ("cache", str(tmp_path), True)
    assert read_grid(SweepOptions(**resumed)) == grid
    more = with_plan({"resume": str(tmp_path), "beta": "0.1,0.2,0.3"})
    assert read_grid(SweepOptions(**more)).varied["beta"] == (0.1, 0.2, 0.3)
    given = {"resume": True, "output": "o", "beta": "1"}
    assert with_plan(given) == given
    with pytest.raises(OptionError, match="^`resume` without a folder continues the sweep in `output`"):
        with_plan({"resume": True, "beta": "1"})
    with pytest.raises(OptionError, match="a sweep is resumed in its own folder"):
        with_plan({"resume": str(tmp_path), "output": "other"})
    with pytest.raises(TrainingError, match="there is no sweep to resume"):
        with_plan({"resume": str(tmp_path / "none")})


def test_a_folder_in_which_a_sweep_was_killed_before_it_wrote_its_plan_is_a_new_one(tmp_path: Path) -> None:
    for name in (".lock", ".claim.tmp", ".sweep.json.tmp"):
        (tmp_path / name).write_text("{")
    assert names(tmp_path, beta="0.1,0.2") == ["beta=0.1", "beta=0.2"]


def test_a_run_is_begun_once_it_has_its_config(tmp_path: Path) -> None:
    names(tmp_path, beta="0.1,0.2")
    (run, _) = plan_runs(tmp_path, "cache", grid_of(beta="0.1,0.2"), resume=False)
    run.folder.mkdir()
    for name in (".claim.tmp", ".config.json.tmp"):
        (run.folder / name).write_text("{")
    assert not run.is_begun
    (run.folder / "config.json").write_text("{}")
    assert run.is_begun
