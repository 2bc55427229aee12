"""What a run finds in its folder when it starts: best/, leftovers of a kill, other inputs, another process."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dpo_cache
from dpo_cache.errors import TrainingError
from dpo_cache.files.claim import CLAIM, Claim, claimed
from dpo_cache.training.gradient_check import GradientCheck
from dpo_cache.training.output import checkpoint as checkpoint_module
from dpo_cache.training.output import disk
from dpo_cache.training.output.run_start import clear_finished, find_checkpoints, find_start, hold_run
from tests.conftest import chat_rows, write_rows
from tests.training.test_evaluations import LEARNING
from tests.training.test_loop import Killed, comparable, cut_off, train, weights

# the best evaluation is that of step 4, and each before it is better than those before
BEST = {**LEARNING, "step_zero": "off", "deterministic": True}
KEPT = {"save_every": 2, "keep": 5, "max_steps": 6}


@pytest.fixture(autouse=True)
def no_gradient_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes long, and has no part in files."""
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")


def same_model(one: Path, other: Path) -> bool:
    other_weights = weights(other)
    return all(torch.equal(value, other_weights[name]) for name, value in weights(one).items())


def best_step(run: Path) -> int | None:
    path = run / "best/best.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


@pytest.fixture(scope="module")
def whole(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended by `patience`, without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(cache, folder, patience=2, **BEST).stopped_by_patience
    return folder


def assert_as(run: Path, whole: Path) -> None:
    assert comparable(run) == comparable(whole) and same_model(run / "model", whole / "model")
    names = ["config.json", "metrics.jsonl", "model"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert sorted(path.name for path in (run / "model").iterdir()) == sorted(
        path.name for path in (whole / "model").iterdir()
    )


# -- before the first checkpoint ---------------------------------------------------------------------------


def test_a_run_killed_after_its_first_best_starts_again_and_keeps_best_until_it_evaluates(
    cache: str, tmp_path: Path, whole: Path
) -> None:
    run, remarks, seen = tmp_path / "run", [], []
    cut_off(cache, run, 4, patience=2, **BEST)
    assert best_step(run) == 3
    train(
        cache,
        run,
        resume=True,
        patience=2,
        log=remarks.append,
        on_metrics=lambda line: seen.append(best_step(run)),
        **BEST,
    )
    assert (
        f"{run}: cut off before its first checkpoint (`save_every` N makes some); it starts again; best/ "
        "stays until the first evaluation replaces it." in remarks
    )
    assert seen[:4] == [3, 3, 3, 1]  # before training, step 1, its evaluation, step 2
    assert_as(run, whole)


def test_best_stays_where_the_second_attempt_fails_before_its_first_update(
    cache: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    cut_off(cache, run, 4, **BEST)

    def fail(line: dict) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train(cache, run, resume=True, on_metrics=fail, **BEST)
    assert sorted(path.name for path in run.iterdir()) == ["best", "config.json"] and best_step(run) == 3
    with pytest.raises(RuntimeError, match="mine"):  # a run of other options does not keep it
        train(cache, run, resume=True, on_metrics=fail, **{**BEST, "beta": 0.3})
    assert not (run / "best").exists()


# -- best/ and the checkpoint ------------------------------------------------------------------------------


def cut_after_best(cache: str, run: Path, **options: Any) -> None:
    """A run whose last checkpoint, of step 3, names the best of step 3, killed with a later best in best/."""
    cut_off(cache, run, 5, **{**BEST, "patience": 2, "save_every": 3, **options})


def test_the_best_that_the_checkpoint_names_is_in_it_once_there_is_a_later_one(
    cache: str, tmp_path: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    cut_after_best(cache, run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    named = json.loads((checkpoint / "state.json").read_text())["best"]["step"]
    assert best_step(run) == 4 and best_step(checkpoint) == named == 3
    seen: list[int | None] = []
    train(
        cache,
        run,
        resume=True,
        patience=2,
        save_every=3,
        on_metrics=lambda line: seen.append(best_step(run)),
        **BEST,
    )
    assert seen == [3, 3, 4, 4, 4, 4]  # steps 4 to 6, each before its evaluation and before the next step
    assert_as(run, whole)


def test_a_run_killed_while_best_was_being_replaced_has_that_of_its_checkpoint(
    cache: str, tmp_path: Path, whole: Path
) -> None:
    for number, leave in enumerate(("nothing", "half")):
        run = tmp_path / f"{number}" / "run"
        cut_after_best(cache, run)
        if leave == "nothing":
            shutil.rmtree(run / "best")
        else:
            (run / "best/best.json").unlink()
            (run / ".best.tmp").mkdir()
            (run / ".best.tmp/config.json").write_text("{")
        train(cache, run, resume=True, patience=2, save_every=3, **BEST)
        assert_as(run, whole)


def test_a_best_without_its_file_is_taken_as_earlier_versions_left_it(
    cache: str, tmp_path: Path, whole: Path
) -> None:
    """Killed between the removal of best/best.json and the renaming of best/ to model/."""
    run = tmp_path / "run"
    cut_off(cache, run, 6, **{**BEST, "patience": 2, "save_every": 5})
    assert best_step(run) == 4
    (run / "best/best.json").unlink()
    remarks: list[str] = []
    train(cache, run, resume=True, patience=2, save_every=5, log=remarks.append, **BEST)
    assert_as(run, whole)
    assert not any("lost" in remark for remark in remarks)


def test_a_best_that_is_lost_is_reported_and_the_run_goes_on(cache: str, tmp_path: Path) -> None:
    run, remarks = tmp_path / "run", []
    cut_off(cache, run, 7, **{**BEST, "save_every": 6})
    shutil.rmtree(run / "best")
    report = train(cache, run, resume=True, save_every=6, log=remarks.append, **BEST)
    assert (
        f"{run / 'best'}: the policy of the best evaluation, step 4, is lost. The run continues; its best is "
        "that of the later evaluations." in remarks
    )
    assert report.finished and report.best and report.best["step"] == 8


def test_a_best_that_vanishes_while_the_run_needs_it_is_a_clear_error(cache: str, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def remove(line: dict) -> None:
        if line["step"] == 5 and "eval/loss" in line:
            shutil.rmtree(run / "best")

    options = {**BEST, "patience": 2, "save_every": 2}
    with pytest.raises(TrainingError, match="expected the policy of the best evaluation, after step 4"):
        train(cache, run, on_metrics=remove, **options)
    assert train(cache, run, resume=True, **options).finished


# -- after the model was published -------------------------------------------------------------------------


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    ("options", "resume"),
    [({"patience": 2}, True), ({"patience": 2, "lora_r": 2}, False), ({}, True)],
    ids=["moved", "written", "the last"],
)
def test_what_a_run_left_that_was_killed_while_it_ended_goes_at_the_next_command(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, resume: bool
) -> None:
    options = {**BEST, **options, "save_every": 2}

    def die(folder: Path) -> None:
        raise Killed

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("dpo_cache.training.saving.remove_leftovers", die)
        train(cache, run, **options)
    assert (run / "checkpoints").exists()
    published = same_files(run / "model")
    with pytest.raises(TrainingError) as caught:
        train(cache, run, resume=resume, **options)
    assert str(caught.value).startswith(
        f"{run}: this run is finished; its model is in {run / 'model'}. It was killed during its clean-up: checkpoints"
    )
    keeps_best = "patience" not in options
    assert (run / "best").exists() == keeps_best
    assert sorted(path.name for path in run.iterdir()) == sorted(
        ["config.json", "metrics.jsonl", "model", *(["best"] if keeps_best else [])]
    )
    published.pop("best.json", None)
    assert same_files(run / "model") == published
    with pytest.raises(TrainingError, match="its model is in .*model.\nChoose another `output`"):
        train(cache, run, resume=resume, **options)


def same_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_finished(run: Path) -> Path:
    for name in ("model", "checkpoints/step-000002", "best", ".best.tmp"):
        (run / name).mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "model/best.json").write_text("{}")
    return run


def test_leftovers_stay_while_another_process_is_ending_the_run(tmp_path: Path) -> None:
    run = make_finished(tmp_path / "run")
    with claimed(run, TrainingError, "it", print):
        with pytest.raises(TrainingError, match="another process is training here"):
            clear_finished(run, print)
        assert (run / "checkpoints").exists() and (run / "model/best.json").exists()
    assert clear_finished(run, print) == ["checkpoints", "best", "model/best.json", ".best.tmp"]
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "model"]
    assert clear_finished(run, print) == []
    (run / CLAIM).touch()  # of a process that was killed when all else was done
    assert clear_finished(run, print) == []
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "model"]


def test_a_dry_run_removes_nothing(tmp_path: Path) -> None:
    run = make_finished(tmp_path / "run")
    before = sorted(run.rglob("*"))
    with pytest.raises(TrainingError, match="finished"), hold_run(run, print, resume=False, is_dry_run=True):
        raise AssertionError("not reached")
    assert sorted(run.rglob("*")) == before


# -- other inputs ------------------------------------------------------------------------------------------


def test_another_evaluation_set_of_the_same_name_is_named(model_folder: str, tmp_path: Path) -> None:
    cache, run = str(tmp_path / "cache"), tmp_path / "run"
    data, held_out = write_rows(tmp_path / "pairs.jsonl", chat_rows(6)), tmp_path / "heldout.jsonl"
    dpo_cache.precompute(model_folder, data, cache)
    dpo_cache.precompute(model_folder, write_rows(held_out, chat_rows(4, seed=9)), cache)
    options = {"eval_pairs": "heldout", "eval_every": 1}
    train(cache, run, should_stop=lambda: True, max_steps=3, epochs=3.0, **options)
    assert json.loads((run / "config.json").read_text())["resolved"]["eval_pairs_digest"]
    dpo_cache.precompute(model_folder, write_rows(held_out, chat_rows(5, seed=8)), cache)
    with pytest.raises(
        TrainingError,
        match=r"this run was started with other options:\n  eval_pairs_digest: \w+ before, \w+ now",
    ):
        train(cache, run, resume=True, max_steps=3, epochs=3.0, **options)
    config = json.loads((run / "config.json").read_text())
    for name in ("eval_pairs_digest", "eval_reference_values"):  # an earlier version did not record them
        del config["resolved"][name]
    (run / "config.json").write_text(json.dumps(config))
    assert train(cache, run, resume=True, max_steps=3, epochs=3.0, **options).finished


@pytest.mark.rotating(3)
@pytest.mark.parametrize(
    ("started", "resumed"),
    [
        ({}, {"precision": "bf16"}),
        ({"precision": "bf16"}, {}),
        ({}, {"optimizer": "adafactor"}),
        ({"optimizer": "adafactor"}, {}),
        ({"lora_r": 2}, {"lora_r": 3}),
        ({"lora_r": 2}, {}),
        ({}, {"lora_r": 2}),
    ],
)
def test_options_of_another_run_are_named_before_the_model_is_loaded(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: dict, resumed: dict
) -> None:
    run = tmp_path / "run"
    train(cache, run, should_stop=lambda: True, batch_size=1, **{"step_zero": "off", **started})

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("dpo_cache.training.setup.open_policy", fail)
    with pytest.raises(TrainingError) as caught:
        train(cache, run, resume=True, batch_size=1, **{"step_zero": "off", **resumed})
    (name,) = {**started, **resumed}
    assert str(caught.value).startswith(f"this run was started with other options:\n  {name}: ")


def test_a_precision_that_another_machine_chooses_is_named_before_the_state_is_restored(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(cache, run, should_stop=lambda: True)
    monkeypatch.setattr("dpo_cache.training.inputs.choose_precision", lambda *_: "bf16")
    with pytest.raises(TrainingError, match="with other options:\n  precision: fp32 before, bf16 now\n"):
        train(cache, run, resume=True)


# -- two processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_a_second_process_is_refused_while_the_first_trains(cache: str, tmp_path: Path, resume: bool) -> None:
    run, errors = tmp_path / "run", []
    if resume:
        train(cache, run, should_stop=lambda: True)

    def intrude(line: dict) -> None:
        for again in (True, False):
            with pytest.raises(TrainingError) as caught:
                train(cache, run, resume=again)
            errors.append(str(caught.value).splitlines()[0])

    train(cache, tmp_path / "whole")
    assert train(cache, run, resume=resume, on_metrics=intrude).finished
    held = f"{run}: another process is training here (process {os.getpid()} on {os.uname().nodename})."
    assert set(errors[::2]) == {held} and set(errors[1::2]) == {f"{run}: not an empty folder."}
    assert comparable(run) == comparable(tmp_path / "whole")


def test_two_first_starts_at_once_are_told_apart(cache: str, tmp_path: Path) -> None:
    """The second comes before the first has written anything."""
    run = tmp_path / "run"
    with hold_run(run, print, resume=False, is_dry_run=False):
        with pytest.raises(TrainingError, match="another process is training here"):
            train(cache, run)
        train(cache, run, dry_run=True)
        assert [path.name for path in run.iterdir()] == [CLAIM]
    assert train(cache, run, max_steps=1).finished and not (run / CLAIM).exists()


@pytest.mark.parametrize("at_step", [0, 2])
def test_a_run_whose_claim_another_machine_has_taken_stops_and_leaves_the_others_files(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    """As after it was suspended: it finds out at its next beat."""
    run, claims = tmp_path / "run", list[Claim]()
    real = Claim.__init__

    def note(self: Claim, *arguments: Any, **options: Any) -> None:
        claims.append(self)
        real(self, *arguments, **options)

    def steal(line: dict) -> None:
        if line["step"] == at_step:
            (run / CLAIM).write_text(json.dumps({"process": 7, "host": "node9", "token": "another"}))
            if at_step == 0:  # before the first update, when a run that fails empties its folder
                raise RuntimeError("mine")
            claims[0].renew()

    monkeypatch.setattr(Claim, "__init__", note)
    with pytest.raises((TrainingError, RuntimeError), match="another process works here now|mine"):
        train(cache, run, on_metrics=steal, eval_pairs="heldout")
    assert [line["step"] for line in comparable(run)] == [0, 1, 2][: at_step + 1]
    assert json.loads((run / CLAIM).read_text())["host"] == "node9" and (run / "config.json").exists()


def test_a_folder_that_a_run_was_killed_in_before_it_wrote_its_config_is_a_new_one(
    cache: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in (CLAIM, ".config.json.tmp"):
        (run / name).write_text("{")
    with pytest.raises(TrainingError, match="there is no run to resume"):
        train(cache, run, resume=True)
    assert find_start(run, print, resume=False) is None
    assert train(cache, run, max_steps=1).finished
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "model"]


# -- saving ------------------------------------------------------------------------------------------------


class TokenizersError(Exception):
    """As the library tokenizers raises it: not even an `OSError`."""


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("what", "error", "advice"),
    [
        ("tokenizer", Exception("No space left on device (os error 28)"), "Free some space. "),
        (
            "tokenizer",
            TokenizersError("File too large (os error 27)"),
            "Raise the limit on the size of a file",
        ),
        (
            "model",
            ValueError("GenerationConfig is invalid:\n- `temperature`"),
            "Then resume from the last checkpoint",
        ),
        ("model", RuntimeError("basic_ios::clear: iostream error"), "Then resume from the last checkpoint"),
    ],
)
def test_every_error_of_a_library_that_saves_is_one_clear_error_and_leaves_nothing(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception, advice: str
) -> None:
    run = tmp_path / "run"

    def fail(self: Any, folder: str, *_: object, **__: object) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise error

    kind = "transformers.PreTrainedTokenizerFast" if what == "tokenizer" else "transformers.PreTrainedModel"
    monkeypatch.setattr(f"{kind}.save_pretrained", fail)
    with pytest.raises(TrainingError) as caught:
        train(cache, run, save_every=1)
    first, second = str(caught.value).split("\n", 1)
    assert first.startswith(f"cannot save {run}/checkpoints/step-000001: {str(error).split(':')[0]}")
    assert second.startswith(advice) and second.endswith("with `resume`.") and caught.value.__cause__ is error
    assert [path for path in run.rglob("*") if "tmp" in path.name] == []
    monkeypatch.undo()
    assert train(cache, run, save_every=1, resume=True).finished


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError("Device or resource busy")

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", fail)
    remarks: list[str] = []
    assert train(cache, tmp_path / "run", save_every=1, log=remarks.append).finished
    assert any(
        "cannot write" in remark and "The run is finished; remove this yourself." in remark
        for remark in remarks
    )


def test_a_checkpoint_whose_optimizer_state_is_not_whole_is_damaged(cache: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    train(cache, run, should_stop=lambda: True, precision="bf16", batch_size=1)
    path = next((run / "checkpoints").iterdir()) / "optimizer.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if not name.endswith("/updates")}, path)
    with pytest.raises(TrainingError, match="optimizer.safetensors: not readable"):
        train(cache, run, resume=True, precision="bf16", batch_size=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "two"},
        {"best": {"measure": "loss", "colour": "red"}},
        {"best": [1]},
        {"later": 1},
        {"step_memory": 3},
    ],
)
def test_a_position_that_makes_no_sense_is_damaged(tmp_path: Path, changes: dict) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 2, "epoch": 0, "pairs_seen": 8, **changes}))
    with pytest.raises(TrainingError, match="state.json: not readable"):
        checkpoint_module.read_position(tmp_path)


def test_disk_space_is_counted_for_both_policies_of_best(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(disk, "shown_bytes", str)
    for options in ({}, {"eval_every": 1}):
        with pytest.raises(TrainingError) as caught:
            train(cache, tmp_path / "run", eval_pairs="heldout", **options)
        needed.append(int(str(caught.value).split(" are needed")[0].split()[-1]))
    assert needed[1] == 3 * needed[0]


# -- damaged checkpoints, and files of users ---------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after its steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    cut_off(cache, folder, 5, **KEPT)
    assert [path.name for path in find_checkpoints(folder)] == ["step-000002", "step-000004"]
    return folder


@pytest.mark.rotating(2)
@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_can_be_removed_to_resume_from_the_one_before(
    cache: str, tmp_path: Path, stopped: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    last = run / "checkpoints/step-000004"
    (last / name).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=f"Remove {last}, and `resume` continues from step-000002"):
        train(cache, run, resume=True, **KEPT)
    shutil.rmtree(last)
    assert train(cache, run, resume=True, **KEPT).num_steps == 6


def test_files_of_users_in_the_folder_of_a_run_do_not_stop_it(
    cache: str, tmp_path: Path, stopped: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "train.log").write_text("notes")
    shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000003.bak")
    assert train(cache, run, resume=True, **KEPT).num_steps == 6
    assert (run / "train.log").read_text() == "notes"


def test_a_folder_of_something_else_is_no_run(cache: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "run/notes.txt").write_text("notes")
    with pytest.raises(TrainingError, match=r"not the folder of a run; it holds notes\.txt"):
        train(cache, tmp_path / "run", resume=True)
