"""The start of a run, found without torch: a new folder, or the last checkpoint of a stopped run.

One process at a time works in the folder, see `files/claim.py`. If that process is killed at any time,
`resume` continues from the last checkpoint, or starts the run again if there is none. A folder without
config.json has no run yet. Once model/ is published, the run is finished, and only leftover files are to be
removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import is_scratch, refused_writes, remove
from dpo_cache.files.claim import CLAIM, Claim, claimed
from dpo_cache.files.locations import check_writable
from dpo_cache.files.sync import sync
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
BEST_FILE = "best.json"
HOLDER = "another process is training here"


def find_start(folder: Path, log: Log, *, resume: bool, clears: bool = False) -> Path | None:
    """The checkpoint from which the run continues; None for a run that starts at the beginning.

    Raises `TrainingError` for a folder that is not a run's, a finished run, and a run that may not be
    resumed. With `clears`, files that a finished run no longer needs are removed.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: not a folder.\nChoose another `output`.")
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    present = {name for name in entries if not is_scratch(name)}
    if not present:
        if resume:
            raise TrainingError(f"{folder}: there is no run to resume.\nRun without `resume` to start one.")
        return None
    if not present <= RUN_FILES and not _is_run(folder):
        raise TrainingError(
            f"{folder}: not the folder of a run; it holds {', '.join(sorted(present - RUN_FILES)[:5])}.\n"
            "Choose another `output`."
        )
    if "model" in present:
        removed = clear_finished(folder, log) if clears else []
        note = f" It was killed during its clean-up: {', '.join(removed)} removed." if removed else ""
        raise TrainingError(
            f"{folder}: this run is finished; its model is in {folder / 'model'}.{note}\n"
            "Choose another `output` to train again."
        )
    if not resume:
        raise TrainingError(
            f"{folder}: not an empty folder.\nContinue its run with `resume`, or choose another `output`."
        )
    return _last_checkpoint(folder, log, has_best="best" in present)


@contextmanager
def hold_run(folder: Path, log: Log, *, resume: bool, is_dry_run: bool) -> Iterator[Claim | None]:
    """Keep other processes out of the run's folder until the block ends. Yields None for a dry run, which
    writes nothing, and so needs no claim.

    Raises `TrainingError` before anything is written if another process has the folder, and as `find_start`
    does.
    """
    find_start(folder, lambda _: None, resume=resume, clears=not is_dry_run)
    if is_dry_run:
        yield None
        return
    with claimed(folder, TrainingError, HOLDER, log) as claim:
        yield claim


def is_begun(folder: Path) -> bool:
    """Return whether the folder has a run, which `resume` continues; without a checkpoint it starts again."""
    return (folder / "config.json").exists()


def _is_run(folder: Path) -> bool:
    """Return whether config.json belongs to a run and not, for example, to a model. Users keep other files
    with it, such as logs.
    """
    try:
        return "resolved" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def clear_finished(folder: Path, log: Log) -> list[str]:
    """Remove files that a finished run no longer needs, if it was killed before it removed them; returns the
    names.

    Raises `TrainingError` if another process is still in the folder, or if something cannot be removed.
    """
    if not _leftovers(folder) and not (folder / CLAIM).exists():
        return []
    with claimed(folder, TrainingError, HOLDER, log):  # also removes the claim of a dead process
        return remove_leftovers(folder)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove files that a finished run no longer needs, and return their names. Raises `TrainingError`."""
    removed = []
    for path in _leftovers(folder):
        with refused_writes(path, TrainingError, "The run is finished; remove this yourself."):
            remove(path)
        removed.append(path.relative_to(folder).as_posix())
    if removed:
        sync(folder)
    return removed


def remove_scratch(folder: Path) -> None:
    """Remove the partial files of killed writers in the folder of a run, which this process has claimed."""
    for path in (*_scratch(folder), *_scratch(folder / "checkpoints")):
        remove(path)


def check_output(folder: Path) -> None:
    """Raise `TrainingError` if a run could not write its folder. The check leaves no file in it."""
    check_writable(folder, TrainingError, is_folder=True)


def find_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _last_checkpoint(folder: Path, log: Log, *, has_best: bool) -> Path | None:
    if checkpoints := find_checkpoints(folder):
        return checkpoints[-1]
    best = "; best/ stays until the first evaluation replaces it" if has_best else ""
    log(f"{folder}: cut off before its first checkpoint (`save_every` N makes some); it starts again{best}.")
    return None


def _leftovers(folder: Path) -> list[Path]:
    """The files that a finished run removes, in this order: while model/best.json exists, best/ is not
    needed.
    """
    marker = folder / "model" / BEST_FILE
    best = [folder / "best", marker] if marker.exists() else []
    checkpoints = folder / "checkpoints"
    return [path for path in (checkpoints, *best, *_scratch(folder)) if os.path.lexists(path)]


def _scratch(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if is_scratch(path.name) and path.name != CLAIM]
