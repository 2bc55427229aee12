"""What a checkpoint records of itself, and what a resumed run finds changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import TrainingError
from dpo_cache.options.train import TrainOptions
from dpo_cache.store import open_cache
from dpo_cache.store import pairs as pairs_module
from dpo_cache.training.gradient_check import GradientCheck
from dpo_cache.training.inputs import open_pairs
from dpo_cache.training.output.checkpoint import check_files, read_position
from dpo_cache.training.setup import resolved_inputs
from dpo_cache.types import Score, ScoredPair
from tests.training.test_loop import train

OPTIONS = {
    "step_zero": "off",
    "save_every": 1,
    "max_steps": 2,
    "eval_pairs": "heldout",
    "eval_every": 1,
    "shuffle": False,
}
POSITION = {"step": 2, "epoch": 0, "pairs_seen": 8}
MEMORY = {"requested": [None, "auto"], "micro_tokens": 64, "pair_tokens": None, "mode": "none"}
BEST = {"measure": "loss", "step": 1, "value": 0.5, "num_worse": 0}


@pytest.fixture(scope="module")
def stopped(cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step, with a checkpoint of it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientCheck, "problem", lambda *_: "")
        train(cache, folder, should_stop=lambda: True, **OPTIONS)
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture
def checkpoint(run: Path) -> Path:
    (found,) = (run / "checkpoints").iterdir()
    return found


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


# -- files -------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(checkpoint: Path) -> None:
    check_files(checkpoint)
    recorded = json.loads((checkpoint / "state.json").read_text())["files"]
    assert {*recorded, "state.json"} == {path.name for path in checkpoint.iterdir()}
    for name in recorded:
        for place in (0, -1):
            flip(checkpoint / name, place)
            with pytest.raises(
                TrainingError, match=f"{name}: not readable .its content is not what was saved"
            ):
                check_files(checkpoint)
            flip(checkpoint / name, place)
    check_files(checkpoint)
    (checkpoint / "optimizer.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors: not readable .*No such file"):
        check_files(checkpoint)


def test_a_flipped_bit_of_state_json_is_found(checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    position = read_position(checkpoint)
    for place in range(0, len(path.read_bytes()) - 1, 5):  # without the line feed at its end
        flip(path, place)
        with pytest.raises(TrainingError, match=r"state\.json: not readable"):
            read_position(checkpoint)
        flip(path, place)
    assert read_position(checkpoint) == position


def test_a_run_is_not_resumed_from_a_changed_file_and_the_model_is_not_loaded(
    cache: str, run: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the model is loaded")

    flip(checkpoint / "optimizer.safetensors", -5)
    monkeypatch.setattr("dpo_cache.training.setup.open_policy", fail)
    with pytest.raises(
        TrainingError,
        match=r"optimizer\.safetensors: not readable .*\nRemove .*, and `resume` starts the run again",
    ):
        train(cache, run, resume=True, **OPTIONS)


def test_a_best_that_is_moved_into_a_checkpoint_does_not_change_it(checkpoint: Path) -> None:
    (checkpoint / "best").mkdir()
    (checkpoint / "best/best.json").write_text("{}")
    check_files(checkpoint)


# -- state.json --------------------------------------------------------------------------------------------


def write_state(folder: Path, **changes: Any) -> Path:
    """The state of a checkpoint of an earlier version, without checksums."""
    folder.mkdir(parents=True)
    state = {**POSITION, "step_memory": MEMORY, "best": BEST, **changes}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = write_state(tmp_path / "step-000002", step_memory=None, best=None, thrift=MEMORY)
    assert read_position(folder).step_memory == MEMORY
    check_files(folder)


def test_a_run_continues_from_a_checkpoint_without_checksums(cache: str, run: Path, checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"], state["crc"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert train(cache, run, resume=True, **OPTIONS).finished


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in POSITION for value in (-1, 1.0, True, None, "2", [2])),
        {"step": 99},
        {"step": 1},
        *({"step_memory": value} for value in (3, [1], {"x": 1}, "text")),
        *({"step_memory": {**MEMORY, name: "zz"}} for name in MEMORY),
        {"step_memory": {**MEMORY, "micro_tokens": 0}},
        {"step_memory": {**MEMORY, "mode": ["none"]}},
        {"best": [1]},
        *({"best": {**BEST, name: value}} for name in BEST for value in ("x", [1], {"a": 1}, True)),
        {"best": {**BEST, "more": 1}},
        {"more": 1},
        {"files": [1]},
    ],
    ids=str,
)
def test_odd_values_of_a_state_are_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_state(tmp_path / "step-000002", **changes)
    with pytest.raises(TrainingError, match=r"state\.json: not readable"):
        check_files(folder)


def test_a_step_that_is_not_that_of_the_folder_is_named(tmp_path: Path) -> None:
    folder = write_state(tmp_path / "run/checkpoints/step-000003", step=99)
    write_state(tmp_path / "run/checkpoints/step-000002")
    with pytest.raises(
        TrainingError, match=r"\(it is of step 99\)\.\nRemove .*3, and `resume` continues from step-000002"
    ):
        read_position(folder)


# -- the reference's values --------------------------------------------------------------------------------


@pytest.fixture
def other_cache(cache: str, tmp_path: Path) -> str:
    return shutil.copytree(cache, str(tmp_path / "cache"))


def republish(cache: str, name: str, change: float) -> None:
    """The pair set again, with other log-probs of the first chosen answer."""
    old = open_cache(cache).pairs(name)
    first, *rest = old
    changed = Score(first.ref_chosen.token_logps + change)
    writer = open_cache(cache).write_pairs(old.manifest["name"], old.manifest["split"])
    writer.add([ScoredPair(first.pair, changed, first.ref_rejected), *rest])
    made = ("format", "num_pairs", "parts", "sha256")
    writer.finish({member: value for member, value in old.manifest.items() if member not in made})


@pytest.mark.parametrize(
    ("name", "field"), [("pairs", "reference_values"), ("heldout", "eval_reference_values")]
)
def test_other_values_of_the_same_pairs_are_another_run(
    other_cache: str, run: Path, name: str, field: str
) -> None:
    before = open_cache(other_cache).pairs(name).manifest
    republish(other_cache, name, -0.5)
    assert open_cache(other_cache).pairs(name).manifest["pairs_digest"] == before["pairs_digest"]
    with pytest.raises(
        TrainingError,
        match=rf"this run was started with other options:\n  {field}: \w+ before, \w+ now\nGive",
    ):
        train(other_cache, run, resume=True, **OPTIONS)
    config = json.loads((run / "config.json").read_text())
    del config["resolved"][field]  # of an earlier version, which did not record it
    (run / "config.json").write_text(json.dumps(config))
    assert train(other_cache, run, resume=True, **OPTIONS).finished


def test_the_same_values_in_other_parts_are_the_same_run_unless_they_are_shuffled(
    cache: str, other_cache: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "PART_PAIRS", 4)
    for name in ("pairs", "heldout"):
        republish(other_cache, name, 0.0)
        assert len(open_cache(other_cache).pairs(name).block_sizes) > 1
    found = {}
    for shuffle in (True, False):
        options = TrainOptions(
            cache=cache, output=str(run), pairs="pairs", eval_pairs="heldout", shuffle=shuffle
        )
        both = [
            resolved_inputs(options, open_pairs(options, open_cache(place)), 4)
            for place in (cache, other_cache)
        ]
        found[shuffle] = {name for name in both[0] if both[0][name] != both[1][name]}
    assert found == {True: {"shuffled_blocks"}, False: set()}
    assert train(other_cache, run, resume=True, **OPTIONS).finished


def test_the_values_of_tokens_count_where_the_loss_weights_them(cache: str) -> None:
    pairs = open_cache(cache).pairs("pairs")
    assert len({pairs.values_digest(), pairs.values_digest(with_tokens=True)}) == 2
    for ld_reference, digest in (
        (True, pairs.values_digest(with_tokens=True)),
        (False, pairs.values_digest()),
    ):
        options = TrainOptions(
            cache=cache, output="run", pairs="pairs", ld_alpha=0.5, ld_reference=ld_reference
        )
        assert (
            resolved_inputs(options, open_pairs(options, open_cache(cache)), 4)["reference_values"] == digest
        )
