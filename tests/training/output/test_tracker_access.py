"""Trackers that cannot be used are found before anything is loaded or written."""

import importlib.util
from pathlib import Path

import pytest

from dpo_cache import packages
from dpo_cache.errors import TrainingError
from dpo_cache.training import inputs
from dpo_cache.training.output.tracker_access import check_trackers
from tests.training.test_loop import train


@pytest.mark.parametrize(
    ("absent", "asked", "problem"),
    [
        ({"wandb"}, ["wandb"], "`log_to` wandb needs wandb.\nRun `pip install wandb`."),
        (
            {"tensorboard", "mlflow"},
            ["tensorboard", "mlflow"],
            "`log_to` tensorboard `log_to` mlflow needs tensorboard, mlflow-skinny.\n"
            "Run `pip install tensorboard mlflow-skinny`.",
        ),
    ],
)
def test_a_missing_tracker_is_an_error_before_anything_is_done(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: set, asked: list, problem: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(TrainingError) as caught:
        train(cache, tmp_path / "run", log_to=asked)
    assert str(caught.value) == problem
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_name_is_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "nothing_installed").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setitem(packages.TRACKER_PACKAGES, "nothing_installed", "nothing")
    with pytest.raises(TrainingError, match="pip install nothing"):
        check_trackers(["nothing_installed"])


@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*")
def test_a_store_that_mlflow_does_not_know_is_found_before_a_model_is_loaded(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    loaded: list[object] = []
    monkeypatch.setattr(inputs, "load_base", lambda *_, **__: loaded.append(1))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://store")
    with pytest.raises(TrainingError, match="`log_to` mlflow cannot be opened: .*nonsense") as caught:
        train(cache, tmp_path / "run", log_to="mlflow")
    assert str(caught.value).endswith("with MLFLOW_TRACKING_URI, or leave it out.")
    assert not loaded and not (tmp_path / "run" / "config.json").exists()


def test_a_space_without_a_token_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(TrainingError, match="TRACKIO_SPACE_ID is me/space, and no token of the Hub"):
        check_trackers(["trackio"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    check_trackers(["trackio"])


def test_a_folder_of_tensorboard_that_cannot_be_written_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    with pytest.raises(TrainingError, match="choose another folder with TENSORBOARD_LOGGING_DIR"):
        check_trackers(["tensorboard"])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "new" / "logs"))
    check_trackers(["tensorboard"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
