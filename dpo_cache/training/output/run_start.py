"""The start of a run, found without torch: a new folder, or the last checkpoint of a stopped run."""

from __future__ import annotations

import os
from pathlib import Path

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import is_scratch
from dpo_cache.log import Log

BEFORE_MODEL = {
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "trackers.json",
    "checkpoints",
    "best",
    "tensorboard",
}  # fmt: skip
RUN_FILES = {*BEFORE_MODEL, "model"}


def find_start(folder: Path, log: Log, *, resume: bool) -> Path | None:
    """The checkpoint from which the run continues; None for a run that starts at the beginning.

    Raises `TrainingError` for a folder of something else, a finished run, and one that is not to be resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: not a folder.\nChoose another `output`.")
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    present = {name for name in entries if not is_scratch(name)}
    if not present:
        if resume:
            raise TrainingError(f"{folder}: there is no run to resume.\nRun without `resume` to start one.")
        return None
    if not present <= RUN_FILES:
        raise TrainingError(
            f"{folder}: not the folder of a run; it holds {', '.join(sorted(present - RUN_FILES)[:5])}.\n"
            "Choose another `output`."
        )
    if not resume:
        raise TrainingError(
            f"{folder}: not an empty folder.\nContinue its run with `resume`, or choose another `output`."
        )
    if "model" in present:
        raise TrainingError(
            f"{folder}: this run is finished; its model is in {folder / 'model'}.\n"
            "Choose another `output` to train again."
        )
    return _last_checkpoint(folder, log, has_best="best" in present)


def check_output(folder: Path) -> None:
    """Raise `TrainingError` if a run could not write its folder; nothing is written."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise TrainingError(f"{folder}: {existing} cannot be written.\nChoose another `output`.")


def find_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _last_checkpoint(folder: Path, log: Log, *, has_best: bool) -> Path | None:
    if checkpoints := find_checkpoints(folder):
        return checkpoints[-1]
    if has_best:
        raise TrainingError(
            f"{folder}: cut off before its first checkpoint, so there is nothing to resume from; "
            f"{folder / 'best'} holds its best policy so far.\n"
            "Choose another `output`, and `save_every` N for checkpoints."
        )
    log(f"{folder}: cut off before its first checkpoint (`save_every` N makes some); it starts again.")
    return None
