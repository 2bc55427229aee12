"""A training run's state on disk: `RUN/checkpoints/step-000010/`.

    model files            as `save_pretrained` writes them (safetensors), with the base's towers for images;
                           for an adapter, only its weights
    optimizer.safetensors  `<parameter>/<state>` per optimizer state, e.g. `model.norm.weight/exp_avg`
    tokenizer files        so that a resumed run needs only the cache, and an adapter its base
    state.json             see `RunPosition`; and a CRC-32 of each file above, and of state.json itself
    best/                  the best policy that state.json names, if RUN/best has a later one

A checkpoint is written under a dot-name and renamed, so it is complete or absent. Nothing is pickled. It is
the same for any number of ranks, and any number can resume from it: the main rank joins the shards in its
files.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.files.atomic import is_refused_write, remedy_of, remove, replaced
from dpo_cache.lm.sharded import LocalShard
from dpo_cache.training.evaluations import Best
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.optim.updates import Updater
from dpo_cache.training.output.run_position import RunPosition, problem_of
from dpo_cache.training.output.run_start import find_checkpoints
from dpo_cache.training.output.whole import (
    MappedTensors,
    Sharded,
    TensorsFile,
    gathered_bytes,
    shards_of_optimizer,
    shards_of_policy,
)
from dpo_cache.training.ranks import Ranks

OPTIMIZER = "optimizer.safetensors"
WHOLE = "whole"  # temporary folder for a policy's joined tensors
FILE_BYTES = "5GB"  # size of files whose weights come from shards: a file is in memory when it is written
READ_BYTES = 2**24  # bytes of a file that are read at once
READERS = 4  # files that are read at once


def save_checkpoint(
    run: Path,
    policy: TrainedModel,
    optimizer: Updater,
    position: RunPosition,
    *,
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Publish the state after a step, then remove all but the last `keep`. Raises `TrainingError`.

    All `ranks` call this, and the main one writes.
    """
    target = run / "checkpoints" / f"step-{position.step:06d}"
    shards = policy.sharded.shards if policy.sharded else None
    tensors = {} if shards is None else shards_of_optimizer(optimizer, shards)

    def write(scratch: Path) -> None:
        if shards is None:
            with _failed_saves():
                save_file(optimizer.tensors(), scratch / OPTIMIZER)
        files = [path for path in scratch.rglob("*") if path.is_file()]
        sums = zip(files, _checksums(files), strict=True)
        state = {**asdict(position), "files": {str(path.relative_to(scratch)): crc for path, crc in sums}}
        (scratch / "state.json").write_text(json.dumps({**state, "crc": _state_checksum(state)}) + "\n")

    remedy = "Then resume from the last checkpoint with `resume`."
    write_policy(target, policy, write, remedy=remedy, ranks=ranks, optimizer=tensors)
    if ranks is not None and not ranks.is_main:
        return target
    for older in find_checkpoints(run)[:-keep]:
        with suppress(OSError):  # the next checkpoint tries again
            shutil.rmtree(older)
    return target


def write_policy(
    target: Path,
    policy: TrainedModel,
    write_more: Callable[[Path], None] = lambda _: None,
    *,
    remedy: str,
    ranks: Ranks | None = None,
    optimizer: Sharded | None = None,
) -> None:
    """Publish a folder with the policy's weights, its tokenizer and the files of `write_more`.

    The folder is complete or absent. For a policy with an adapter, only the adapter is written. All `ranks`
    call this: the main one writes, with the shards of the others, also those of the `optimizer`. Raises
    `TrainingError` on all of them.
    """
    ranks = ranks or Ranks()
    weights, names = ({}, {}) if policy.sharded is None else shards_of_policy(policy, ranks)
    parts = gathered_bytes({**weights, **(optimizer or {})}, ranks)
    problem = None
    if ranks.is_main:
        try:
            _write_policy(target, policy, parts, weights, names, optimizer, write_more, remedy)
        except TrainingError as error:
            problem = error
    deque(parts, maxlen=0)  # also after an error, because the ranks iterate together
    if problem := ranks.share(problem):
        raise problem


def _write_policy(
    target: Path,
    policy: TrainedModel,
    parts: Iterator[tuple[str, int, torch.Tensor]],
    weights: Sharded,
    names: Mapping[str, str],
    optimizer: Sharded | None,
    write_more: Callable[[Path], None],
    remedy: str,
) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as scratch:
            scratch.mkdir()
            with _failed_saves():
                if policy.sharded is None:
                    _save_weights(scratch, policy)
                else:
                    whole = _whole_weights(scratch, parts, weights, optimizer)
                    _save_weights(scratch, policy, {name: whole[first] for name, first in names.items()})
                    del whole
                    remove(scratch / WHOLE)
                policy.tokenizer.save_pretrained(scratch)
            write_more(scratch)
    except (OSError, _SaveError) as error:
        cause = error.__cause__ if isinstance(error, _SaveError) and error.__cause__ else error
        advice = f"{remedy_of(cause)} {remedy}" if is_refused_write(cause) else remedy
        raise TrainingError(f"cannot save {target}: {first_line(cause)}.\n{advice}") from cause


def _save_weights(scratch: Path, policy: TrainedModel, state: dict[str, torch.Tensor] | None = None) -> None:
    """Save the model, or its adapter; `state` has the joined tensors of a model that holds shards."""
    given: dict[str, Any] = {} if state is None else {"state_dict": state}
    if policy.adapted is not None:
        policy.adapted.save_pretrained(str(scratch), **given)
        (scratch / "README.md").unlink(missing_ok=True)  # peft's own card
        return
    if state is not None:
        given["max_shard_size"] = FILE_BYTES
    policy.model.save_pretrained(scratch, **given)
    if policy.left_out is not None:
        policy.left_out.add_to(scratch)


def _whole_weights(
    scratch: Path,
    parts: Iterator[tuple[str, int, torch.Tensor]],
    weights: Sharded,
    optimizer: Sharded | None,
) -> dict[str, torch.Tensor]:
    """Write the tensors that shards make up: the optimizer's, and the policy's, which are returned."""
    mapped = MappedTensors(scratch / WHOLE, weights)
    file = TensorsFile(scratch / OPTIMIZER, optimizer) if optimizer else None
    try:
        for name, start, content in parts:
            if name in weights:
                mapped.write(name, start, content)
            else:
                assert file is not None
                file.write(name, start, content)
    finally:
        if file is not None:
            file.close()
    return mapped.tensors()


class _SaveError(Exception):
    """A library could not save a file; its own error is the cause."""


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
    """Raise `TrainingError` for a file whose content is not what was saved. Checkpoints of earlier versions
    have no checksums.
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
        state = json.loads((checkpoint / "state.json").read_bytes())
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


def restore_optimizer(
    checkpoint: Path, optimizer: Updater, shards: Mapping[str, LocalShard] | None = None
) -> None:
    """Restore the saved optimizer state, bit for bit; with `shards`, only the rows of this rank."""
    path = checkpoint / OPTIMIZER
    try:
        optimizer.restore(load_file(path) if shards is None else _load_rows(path, shards))
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: the state of a parameter is incomplete
        raise damaged(path, error) from error


def _load_rows(path: Path, shards: Mapping[str, LocalShard]) -> dict[str, torch.Tensor]:
    """This rank's rows of each tensor of the optimizer; tensors without dimensions as they are."""
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            entry, shard = file.get_slice(name), shards.get(name.rpartition("/")[0])
            if entry.get_shape() and shard is not None:
                found[name] = entry[shard.start : shard.stop]
            else:
                found[name] = file.get_tensor(name)
    return found


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
