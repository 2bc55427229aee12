"""A training run's state on disk: `RUN/checkpoints/step-000010/`.

    model files            as `save_pretrained` writes them (safetensors), with the base's towers for images;
                           of an adapter, only its weights
    optimizer.safetensors  `<parameter>/<state>` per optimizer state, e.g. `model.norm.weight/exp_avg`
    tokenizer files        so that a resumed run needs only the cache, and an adapter its base
    state.json             see `RunPosition`; and a CRC-32 of each file above, and of state.json itself
    best/                  the best policy that state.json names, if RUN/best has a later one

A checkpoint is written under a dot-name and renamed, so it is whole or absent. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.files.atomic import is_refused_write, remedy_of, replaced
from dpo_cache.training.evaluations import Best
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.output.run_position import RunPosition, problem_of
from dpo_cache.training.output.run_start import find_checkpoints

READ_BYTES = 2**24  # of a file, at once
READERS = 4  # of files, at once


def save_checkpoint(
    run: Path, policy: TrainedModel, optimizer: Updater, position: RunPosition, *, keep: int
) -> Path:
    """Publish the state after a step, then remove all but the last `keep`. Raises `TrainingError`."""
    target = run / "checkpoints" / f"step-{position.step:06d}"

    def write(scratch: Path) -> None:
        with _failed_saves():
            save_file(optimizer.tensors(), scratch / "optimizer.safetensors")
        files = [path for path in scratch.rglob("*") if path.is_file()]
        sums = zip(files, _checksums(files), strict=True)
        state = {**asdict(position), "files": {str(path.relative_to(scratch)): crc for path, crc in sums}}
        (scratch / "state.json").write_text(json.dumps({**state, "crc": _state_checksum(state)}) + "\n")

    write_policy(target, policy, write, remedy="Then resume from the last checkpoint with `resume`.")
    for older in find_checkpoints(run)[:-keep]:
        with suppress(OSError):  # the next checkpoint tries again
            shutil.rmtree(older)
    return target


def write_policy(
    target: Path, policy: TrainedModel, write_more: Callable[[Path], None] = lambda _: None, *, remedy: str
) -> None:
    """Publish a folder with the policy's weights, its tokenizer and the files of `write_more`.

    It is whole or absent. Of a policy with an adapter, only the adapter is written. Raises `TrainingError`.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as scratch:
            scratch.mkdir()
            with _failed_saves():
                if policy.adapted is None:
                    policy.model.save_pretrained(scratch)
                    if policy.left_out is not None:
                        policy.left_out.add_to(scratch)
                else:
                    policy.adapted.save_pretrained(str(scratch))
                    (scratch / "README.md").unlink(missing_ok=True)  # peft's own card
                policy.tokenizer.save_pretrained(scratch)
            write_more(scratch)
    except (OSError, _SaveError) as error:
        cause = error.__cause__ if isinstance(error, _SaveError) and error.__cause__ else error
        advice = f"{remedy_of(cause)} {remedy}" if is_refused_write(cause) else remedy
        raise TrainingError(f"cannot save {target}: {first_line(cause)}.\n{advice}") from cause


class _SaveError(Exception):
    """A library could not save; its own error is the cause."""


@contextmanager
def _failed_saves() -> Iterator[None]:
    """Raise `_SaveError` for every error of a library that saves: a full disk is a plain `Exception` of
    tokenizers, a `SafetensorError`, or an `OSError`.
    """
    try:
        yield
    except Exception as error:
        raise _SaveError from error


def read_position(checkpoint: Path) -> RunPosition:
    """The position of the run when the checkpoint was saved. Raises `TrainingError`."""
    return _read_state(checkpoint)[0]


def check_files(checkpoint: Path) -> None:
    """Raise `TrainingError` for a file that is not as it was saved. Checkpoints of earlier versions have no
    checksums.
    """
    files = _read_state(checkpoint)[1]
    paths = [checkpoint / name for name in files]
    for path, found, saved in zip(paths, _checksums(paths), files.values(), strict=True):
        if found != saved:
            reason = "its content is not what was saved" if isinstance(found, int) else found
            raise damaged(path, ValueError(reason))


def _read_state(checkpoint: Path) -> tuple[RunPosition, dict[str, int]]:
    """The position in state.json, and the checksums of the other files by name."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if "crc" in state and state.pop("crc") != _state_checksum(state):
            raise ValueError("its content is not what was saved")
        files = state.pop("files", {})
        if "thrift" in state:  # the key of earlier versions
            state["step_memory"] = state.pop("thrift")
        position = RunPosition(**state)
        if problem := problem_of(position):
            raise ValueError(problem)
        if checkpoint.name.startswith("step-") and int(checkpoint.name[5:]) != position.step:
            raise ValueError(f"it is of step {position.step}")
        Best(**(position.best or {}))
        dict.items(files)
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint / "state.json", error) from error
    return position, files


def _checksums(paths: Sequence[Path]) -> list[int | OSError]:
    """The CRC-32 of each file, or the error with which it cannot be read."""
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(_checksum, paths))


def _checksum(path: Path) -> int | OSError:
    crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        return error
    return crc


def _state_checksum(state: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def restore_optimizer(checkpoint: Path, optimizer: Updater) -> None:
    """Restore the saved optimizer state, bit for bit."""
    path = checkpoint / "optimizer.safetensors"
    try:
        optimizer.restore(load_file(path))
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: the state of a parameter is not whole
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> TrainingError:
    """The error for a file of a run that cannot be read."""
    place = next((folder for folder in (path, *path.parents) if folder.parent.name == "checkpoints"), None)
    others = [other for other in find_checkpoints(place.parents[1]) if other != place] if place else []
    advice = "The run cannot be resumed: choose another `output` and start it again."
    if others:
        advice = f"Remove {place}, and `resume` continues from {others[-1].name}."
    elif place:
        advice = f"Remove {place}, and `resume` starts the run again."
    return TrainingError(f"{path}: not readable ({first_line(error)}).\n{advice}")
