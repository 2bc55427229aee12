"""Checks that the trackers of a run can be used, before torch is imported or a model is loaded: their
packages, keys, stores and folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_cache.errors import DpoCacheError, TrainingError, first_line
from dpo_cache.files.locations import check_writable
from dpo_cache.packages import TRACKER_PACKAGES, is_installed

PROJECT = "dpo-cache"
PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
}
FOLDER_VARIABLE = "TENSORBOARD_LOGGING_DIR"
ADVICE = {
    "wandb": "Correct that, set WANDB_MODE=offline to log without an account, or leave it out.",
    "mlflow": "Correct that, for example with MLFLOW_TRACKING_URI, or leave it out.",
}


def check_trackers(names: Sequence[str], *, is_dry_run: bool = False) -> None:
    """Raise `TrainingError` if a tracker is not installed, has no key, or has no store to write to.

    A dry run writes nothing, so it does not open MLflow's store: opening may create one.
    """
    missing = [TRACKER_PACKAGES[name] for name in names if not is_installed(name)]
    if missing:
        raise TrainingError(
            f"`log_to` {' `log_to` '.join(names)} needs {', '.join(missing)}.\n"
            f"Run `pip install {' '.join(missing)}`."
        )
    for name in names:
        if is_dry_run and name == "mlflow":
            continue
        try:
            CHECKS[name]()
        except DpoCacheError:
            raise
        except Exception as error:  # each tracker's package has its own errors
            raise cannot_open(name, error) from error


def cannot_open(name: str, error: Exception) -> TrainingError:
    """The error of a tracker that cannot be opened."""
    advice = ADVICE.get(name, "Correct that, or leave it out.")
    return TrainingError(f"`log_to` {name} cannot be opened: {first_line(error)}\n{advice}")


def project_of(name: str) -> str:
    """The project or experiment of a tracker's runs."""
    return os.environ.get(PROJECT_VARIABLES[name]) or PROJECT


def _check_tensorboard() -> None:
    if folder := os.environ.get(FOLDER_VARIABLE):
        advice = f"Or choose another folder with {FOLDER_VARIABLE}."
        check_writable(Path(folder).expanduser(), TrainingError, advice, is_folder=True)


def _check_wandb() -> None:
    """Let Weights & Biases find a key, or prompt for one on a terminal, and verify it."""
    import wandb

    if wandb.setup().settings.mode in ("online", "run", "shared"):
        wandb.login(verify=True)


def _check_trackio() -> None:
    if space := os.environ.get("TRACKIO_SPACE_ID"):
        from huggingface_hub import get_token

        if get_token() is None:
            raise TrainingError(
                f"`log_to` trackio cannot be opened: TRACKIO_SPACE_ID is {space}, and no token of the Hub is "
                "configured.\nRun `hf auth login`, or unset TRACKIO_SPACE_ID to log on this machine."
            )


def _check_mlflow() -> None:
    """Let MLflow find its store, which must respond."""
    import mlflow

    mlflow.get_experiment_by_name(project_of("mlflow"))


CHECKS: dict[str, Callable[[], None]] = {
    "tensorboard": _check_tensorboard,
    "wandb": _check_wandb,
    "trackio": _check_trackio,
    "mlflow": _check_mlflow,
}
