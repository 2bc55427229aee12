"""A training run's state on disk: `RUN/checkpoints/step-000010/`.

    model files            as `save_pretrained` writes them (safetensors), with the base's towers for images;
                           of an adapter, only its weights
    optimizer.safetensors  `<parameter>/<state>` per optimizer state, e.g. `model.norm.weight/exp_avg`
    tokenizer files        so that a resumed run needs only the cache, and an adapter its base
    state.json             see `RunPosition`
    best/                  the best policy that state.json names, if RUN/best has a later one

A checkpoint is written under a dot-name and renamed, so it is whole or absent. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.files.atomic import is_refused_write, remedy_of, replaced
from dpo_cache.training.evaluations import Best
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.output.run_start import find_checkpoints


@dataclass(frozen=True)
class RunPosition:
    """The position of a run: steps done, its epoch (from 0), pairs of that epoch already used, and state."""

    step: int = 0
    epoch: int = 0
    pairs_seen: int = 0
    step_memory: dict[str, Any] | None = None  # how steps are split: another split rounds differently
    best: dict[str, Any] | None = None  # the best evaluation so far, see `Best`


def save_checkpoint(
    run: Path, policy: TrainedModel, optimizer: Updater, position: RunPosition, *, keep: int
) -> Path:
    """Publish the state after a step, then remove all but the last `keep`. Raises `TrainingError`."""
    target = run / "checkpoints" / f"step-{position.step:06d}"

    def write(scratch: Path) -> None:
        with _failed_saves():
            save_file(optimizer.tensors(), scratch / "optimizer.safetensors")
        (scratch / "state.json").write_text(json.dumps(asdict(position)) + "\n")

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
    """The position of the run when the checkpoint was saved."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if "thrift" in state:  # the key of earlier versions
            state["step_memory"] = state.pop("thrift")
        position = RunPosition(**state)
        for number in (position.step, position.epoch, position.pairs_seen):
            range(number)  # raises `TypeError` for anything but a whole number
        Best(**(position.best or {}))
        dict(position.step_memory or {})
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint / "state.json", error) from error
    return position


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
