"""`log_to`: trackers hold what metrics.jsonl holds. Everything is local; nothing is sent anywhere."""

import importlib
import json
import os
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpo_cache.errors import TrainingError
from dpo_cache.training.output import tracker_access
from dpo_cache.training.output.trackers import flat_config
from tests import programs
from tests.training.test_loop import comparable, metrics, train, weights

EVALUATED = {"eval_pairs": "heldout", "eval_every": 2, "lr": 1e-2}
NAMES = ["tensorboard", "wandb", "trackio", "mlflow"]
Series = dict[str, list[tuple[int, float]]]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*"),
]


@pytest.fixture(scope="module", autouse=True)
def wandb_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """wandb reads its environment once a process."""
    path = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "MODE": "offline",
            "DIR": path,
            "SILENT": "true",
            "X_DISABLE_STATS": "true",
        }.items():
            patch.setenv(f"WANDB_{name}", str(value))
        yield path


@pytest.fixture(autouse=True)
def local_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tracker writes into the test's folder, and has no network to ask."""
    for name in (
        *tracker_access.PROJECT_VARIABLES.values(),
        tracker_access.FOLDER_VARIABLE,
        "WANDB_RUN_ID",
        "WANDB_CONSOLE",
        "MLFLOW_RUN_ID",
    ):
        monkeypatch.delenv(name, raising=False)
    settings = {
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true", "GIT_PYTHON_REFRESH": "quiet",
        "TRACKIO_DIR": tmp_path / "trackio",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    importlib.import_module("trackio")
    for name, module in list(sys.modules.items()):  # they read it once, on import
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")


# -- reading back
# ----------------------------------------------------------------------------------------------------------------


def read_tensorboard(output: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    # by step: the files of two processes that began in the same second are read in the order of their ids
    return {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
    }


def read_wandb(output: Path) -> Series:
    series: Series = defaultdict(list)
    for record in written_records(wandb_files(output)[-1]):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                series[item.key or "/".join(item.nested_key)].append(
                    (record.history.step.num, json.loads(item.value_json))
                )
    return series


def written_records(path: Path) -> list:
    """The records of a run that has ended: a process of wandb's own writes them, which may be behind on a
    busy machine.
    """
    for _ in range(300):
        records = wandb_records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path}: no end of the run within 30 s")


def wandb_files(output: Path) -> list[Path]:
    """One for each process of the run, oldest first."""
    id = json.loads((output / "trackers.json").read_text())["wandb"]["id"]
    return sorted(Path(os.environ["WANDB_DIR"]).glob(f"wandb/offline-run-*-{id}/run-{id}.wandb"))


def wandb_records(path: Path) -> list:
    """A .wandb file: a header of 7 bytes, then the log format of LevelDB, blocks of 32 KiB with records in
    parts.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, whole, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(content):
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[offset : offset + 7])
        whole += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(whole))
            whole = b""
    return records


def read_trackio(output: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    series: Series = defaultdict(list)
    id = json.loads((output / "trackers.json").read_text())["trackio"]["id"]
    for line in SQLiteStorage.get_logs("dpo-cache", output.name, run_id=id):
        for name, value in line.items():
            if name not in ("step", "timestamp"):
                series[name].append((line["step"], value))
    return series


def read_mlflow(output: Path) -> Series:
    run = mlflow_run(output)
    from mlflow import MlflowClient

    return {
        name: sorted(
            (point.step, point.value) for point in MlflowClient().get_metric_history(run.info.run_id, name)
        )
        for name in run.data.metrics
    }


def mlflow_run(output: Path):
    from mlflow import MlflowClient

    return MlflowClient().get_run(json.loads((output / "trackers.json").read_text())["mlflow"]["id"])


READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


def expected_series(output: Path, tracker: str) -> Series:
    """What metrics.jsonl holds, under TRL's names."""
    series: Series = defaultdict(list)
    bare = {"train": "", "eval": "eval_"} if tracker == "mlflow" else {"train": "train/", "eval": "eval/"}
    for line in metrics(output):
        phase = "train" if "loss" in line else "eval"
        for name in (
            "loss",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
        ):
            value = line[name if phase == "train" else f"eval/{name}"]
            if value is not None:  # an accuracy where margins are rounding noise is not sent
                series[f"{bare[phase]}{name}"].append((line["step"], value))
        if phase == "train":
            series[f"{bare[phase]}learning_rate"].append((line["step"], line["lr"]))
            series[f"{bare[phase]}grad_norm"].append((line["step"], line["grad_norm"]))
    return series


def assert_tracked(output: Path, tracker: str) -> None:
    found = READERS[tracker](output)
    for name, points in expected_series(output, tracker).items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], (name, found[name])
        assert [value for _, value in found[name]] == [
            pytest.approx(value, rel=1e-6) for _, value in points
        ], name  # TensorBoard: float32


# -- what is logged
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.rotating(2)
@pytest.mark.parametrize("tracker", NAMES)
def test_a_tracker_has_the_lines_of_metrics_jsonl(cache: str, tmp_path: Path, tracker: str) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "run", **EVALUATED, log_to=tracker, log=remarks.append)
    assert_tracked(tmp_path / "run", tracker)
    assert not any("--log-to" in remark for remark in remarks)


def test_stdout_of_the_command_carries_the_report_only(cache: str, tmp_path: Path) -> None:
    place = ["--cache", cache, "--pairs", "pairs", "--output", str(tmp_path / "run")]
    done = programs.run("train", *place, "--max-steps", "1", "--json", "--log-to", "trackio")
    assert done.code == 0, done.err
    assert json.loads(done.out)["num_steps"] == 1
    assert "Trackio" not in done.err and "*" not in done.err


def test_names_of_the_original_repository(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", **EVALUATED, log_to="tensorboard", log_names="original", batch_size=4)
    found, lines = read_tensorboard(tmp_path / "run"), metrics(tmp_path / "run")
    steps, evaluations = (
        [line for line in lines if "loss" in line],
        [line for line in lines if "eval/loss" in line],
    )
    assert found["loss/train"] == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert found["rewards_eval/margins"] == [
        (line["step"], pytest.approx(line["eval/rewards/margins"])) for line in evaluations
    ]
    assert found["counters/examples"] == [(1, 4), (2, 8), (3, 12), (4, 15)]


def test_several_trackers_at_once_change_nothing_in_the_training(cache: str, tmp_path: Path) -> None:
    from accelerate.state import PartialState

    torch.manual_seed(4)
    state = torch.get_rng_state()
    train(cache, tmp_path / "plain", **EVALUATED)
    train(cache, tmp_path / "tracked", **EVALUATED, log_to=NAMES)
    assert torch.equal(torch.get_rng_state(), state)
    assert comparable(tmp_path / "plain") == comparable(tmp_path / "tracked")
    one, other = weights(tmp_path / "plain" / "model"), weights(tmp_path / "tracked" / "model")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not PartialState._shared_state  # an Accelerator made later chooses its device for itself
    assert not (tmp_path / "plain" / "trackers.json").exists()
    assert sorted(json.loads((tmp_path / "tracked" / "trackers.json").read_text())) == sorted(NAMES)


def test_the_config_is_there_as_hyper_parameters_and_the_run_has_the_folders_name(
    cache: str, tmp_path: Path
) -> None:
    train(
        cache, tmp_path / "a run", beta=0.3, max_steps=1, log_to=["mlflow", "tensorboard", "wandb", "trackio"]
    )
    from mlflow import MlflowClient

    run = mlflow_run(tmp_path / "a run")
    assert run.info.run_name == "a run" and run.info.status == "FINISHED"
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "dpo-cache"
    assert (
        run.data.params["beta"] == "0.3"
        and run.data.params["loss"] == "sigmoid"
        and run.data.params["max_steps"] == "1"
    )
    assert run.data.params["resolved/attention"] == "forest" and run.data.params["eval_pairs"] == "None"
    assert list((tmp_path / "a run" / "tensorboard").rglob("hparams.yml"))
    record = [
        entry.run
        for entry in written_records(wandb_files(tmp_path / "a run")[0])
        if entry.WhichOneof("record_type") == "run"
    ][-1]
    assert record.display_name == "a run" and record.project == "dpo-cache"
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_run_config("dpo-cache", "a run")["beta"] == 0.3


def test_environment_variables_of_the_trackers_win(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    for name in tracker_access.PROJECT_VARIABLES.values():
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    train(cache, tmp_path / "run", max_steps=1, log_to=NAMES)
    assert MlflowClient().get_experiment(mlflow_run(tmp_path / "run").info.experiment_id).name == "mine"
    assert any(entry.run.project == "mine" for entry in written_records(wandb_files(tmp_path / "run")[0]))
    assert (tmp_path / "trackio" / "mine.db").exists()
    assert (
        list((tmp_path / "boards" / "run").glob("events.*"))
        and not (tmp_path / "run" / "tensorboard").exists()
    )


def test_a_nested_config_is_flat_for_trackers() -> None:
    config = {
        "loss": ("sigmoid:0.8", "sft:0.2"),
        "model": None,
        "shuffle": True,
        "lr": 1e-6,
        "resolved": {"device": "cpu", "parts": [1, 2]},
    }
    assert flat_config(config) == {
        "loss": "sigmoid:0.8, sft:0.2", "model": None, "shuffle": True, "lr": 1e-6, "resolved/device": "cpu", "resolved/parts": "1, 2",
    }  # fmt: skip


# -- resumption
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.rotating(2)
@pytest.mark.parametrize("tracker", NAMES)
def test_a_resumed_run_continues_in_its_tracker(cache: str, tmp_path: Path, tracker: str) -> None:
    def crash(line: dict) -> None:
        if line["step"] == 3:
            raise RuntimeError("power cut")

    options = {**EVALUATED, "epochs": 2.0, "log_to": tracker, "save_every": 2}
    with pytest.raises(RuntimeError, match="power cut"):
        train(cache, tmp_path / "run", **options, on_metrics=crash)
    id = json.loads((tmp_path / "run" / "trackers.json").read_text())
    if tracker in ("wandb", "tensorboard"):
        time.sleep(1.1)  # files are named by the second, and read in the order of their names
    train(cache, tmp_path / "run", **options, resume=True)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == id
    if tracker == "tensorboard":
        assert_tracked(tmp_path / "run", tracker)
    elif tracker == "wandb":  # offline, each process has a file of its own
        files = wandb_files(tmp_path / "run")
        assert len(files) == 2
        steps = [
            record.history.step.num
            for record in written_records(files[1])
            if record.WhichOneof("record_type") == "history"
        ]
        assert steps == [3, 4, 5, 6, 7, 8]
    else:  # step 3, after the checkpoint, was sent twice
        found = READERS[tracker](tmp_path / "run")
        for name, points in expected_series(tmp_path / "run", tracker).items():
            again = [point for point in points if point[0] == 3 and "eval" not in name]
            assert sorted(found[name]) == [
                (step, pytest.approx(value, rel=1e-6)) for step, value in sorted([*points, *again])
            ], name


@pytest.mark.rotating(2)
@pytest.mark.parametrize("tracker", ["trackio", "mlflow"])
def test_a_tracker_that_is_new_or_lost_its_run_begins_one_at_the_checkpoint(
    cache: str, tmp_path: Path, tracker: str
) -> None:
    options, remarks = {**EVALUATED, "eval_every": 4, "log_to": tracker}, []
    for name, before in (("new", {"log_to": ()}), ("lost", {})):
        seen: list[int] = []
        train(
            cache,
            tmp_path / name,
            **{**options, **before},
            on_metrics=lambda line, seen=seen: seen.append(line["step"]),
            should_stop=lambda seen=seen: seen[-1] == 2,
        )
        if name == "lost":
            (tmp_path / name / "trackers.json").write_text(json.dumps({tracker: {"id": "0" * 32}}))
        train(cache, tmp_path / name, **options, resume=True, log=remarks.append)
        loss = READERS[tracker](tmp_path / name)["loss" if tracker == "mlflow" else "train/loss"]
        assert [step for step, _ in loss] == [3, 4]
    found = f"`log_to` {tracker}: its previous run no longer exists; started a new one."
    assert remarks.count(found) == 1


def test_an_unreadable_list_of_tracker_runs_is_an_error(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", log_to="tensorboard", should_stop=lambda: True)
    (tmp_path / "run" / "trackers.json").write_text('{"tensorboard": ')
    with pytest.raises(
        TrainingError, match="trackers.json: not readable .*\nRemove it: trackers then begin new runs"
    ):
        train(cache, tmp_path / "run", log_to="tensorboard", resume=True)


# -- how runs end
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    ("ending", "status", "exit_code"),
    [
        ("finished", "FINISHED", 0),
        ("stopped", "KILLED", 130),
        ("interrupted", "KILLED", 130),
        ("failed", "FAILED", 1),
    ],
)
def test_trackers_record_how_a_run_ended(
    cache: str, tmp_path: Path, ending: str, status: str, exit_code: int
) -> None:
    def end(line: dict) -> None:
        if line["step"] == 2 and ending in ("interrupted", "failed"):
            raise {"interrupted": KeyboardInterrupt, "failed": RuntimeError}[ending]

    options = {
        "log_to": ["mlflow", "wandb", "tensorboard", "trackio"],
        "on_metrics": end,
        "should_stop": lambda: ending == "stopped",
    }
    if ending in ("interrupted", "failed"):
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            train(cache, tmp_path / "run", **options)
    else:
        train(cache, tmp_path / "run", **options)
    assert mlflow_run(tmp_path / "run").info.status == status
    exits = [
        entry.exit.exit_code
        for entry in written_records(wandb_files(tmp_path / "run")[0])
        if entry.WhichOneof("record_type") == "exit"
    ]
    assert exits == [exit_code]


# -- faults
# ----------------------------------------------------------------------------------------------------------------------


def test_a_tracker_that_cannot_be_opened_stops_the_run_before_training(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://store")
    seen: list[dict] = []
    with pytest.raises(
        TrainingError,
        match="`log_to` mlflow cannot be opened: .*nonsense.*\nCorrect that, .*or leave it out.",
    ):
        train(cache, tmp_path / "run", log_to="mlflow", on_metrics=seen.append)
    assert not seen and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_fails_is_dropped_with_one_remark(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    log, tries = TensorBoardTracker.log, []

    def failing(self, values: dict, step: int | None = None, **options) -> None:
        tries.append(step)
        if len(tries) == 2:
            raise ConnectionError("no route to host")
        log(self, values, step=step, **options)

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: 1 / 0)
    remarks: list[str] = []
    report = train(cache, tmp_path / "run", **EVALUATED, log_to=["tensorboard", "mlflow"], log=remarks.append)
    assert report.finished and len(tries) == 2
    assert [remark for remark in remarks if "`log_to`" in remark] == [
        "`log_to` tensorboard failed: no route to host. It gets no more lines of this run; metrics.jsonl has "
        "all of them."
    ]
    assert_tracked(tmp_path / "run", "mlflow")


def test_a_tracker_that_cannot_be_closed_is_a_remark(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.tracking import TensorBoardTracker

    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: 1 / 0)
    remarks: list[str] = []
    assert train(cache, tmp_path / "run", max_steps=1, log_to="tensorboard", log=remarks.append).finished
    assert "`log_to` tensorboard: not closed properly (division by zero)." in remarks


def test_a_caller_with_a_process_state_keeps_it(cache: str, tmp_path: Path) -> None:
    from accelerate.state import PartialState

    state = PartialState(cpu=True)
    try:
        train(cache, tmp_path / "run", max_steps=1, log_to="tensorboard")
        assert state.initialized and state.device.type == "cpu"
    finally:
        PartialState._reset_state()


def test_variables_of_a_launcher_begin_no_process_group(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    train(cache, tmp_path / "run", max_steps=1, log_to="tensorboard")
    assert not torch.distributed.is_initialized()
    assert os.environ["LOCAL_RANK"] == "0" and os.environ["WORLD_SIZE"] == "2"
    assert_tracked(tmp_path / "run", "tensorboard")


def test_a_run_without_trackers_loads_none_of_them() -> None:
    code = """
import sys
import dpo_cache.training.loop
from dpo_cache.training.output.tracker_access import check_trackers
from dpo_cache.training.output.trackers import open_trackers
check_trackers([])
with open_trackers([], None, {}, log_names="trl", history=[], is_resumed=False, log=print) as trackers:
    trackers.log({"step": 1, "loss": 0.5, "epoch": 1.0, "num_pairs": 4})
loaded = {"wandb", "mlflow", "trackio", "tensorboard"} & set(sys.modules)
assert not loaded, loaded
"""
    done = programs.run(script=code)
    assert done.code == 0, done.err
