"""A training run's state on disk: `RUN/checkpoints/step-000010/`.

    model files            as `save_pretrained` writes them (safetensors)
    optimizer.safetensors  `<parameter>/<state>` per optimizer state, e.g. `model.norm.weight/exp_avg`
    tokenizer files        so that a resumed run needs nothing but the cache
    state.json             {"step": ..., "epoch": ..., "pairs_seen": ...}

A checkpoint is written under a dot-name and renamed, so it is whole or absent. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.store.disk import sync
from dpo_cache.training.updates import Updater


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done, the epoch it is in (from 0), pairs of that epoch already used."""

    step: int = 0
    epoch: int = 0
    pairs_seen: int = 0


def save_checkpoint(run: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: Updater, progress: Progress) -> Path:
    """Publish the state after a step, then drop older ones. Raises `TrainingError` where the disk refuses."""
    target = run / "checkpoints" / f"step-{progress.step:06d}"
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        save_file(optimizer.tensors(), scratch / "optimizer.safetensors")
        (scratch / "state.json").write_text(json.dumps(asdict(progress)) + "\n")
        publish_folder(scratch, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise TrainingError(
            f"cannot save {target}: {first_line(error)}.\nFree some space, then go on from the last checkpoint with --resume."
        ) from error
    for older in find_checkpoints(run)[:-1]:
        shutil.rmtree(older)
    return target


def publish_folder(scratch: Path, target: Path) -> None:
    """Give a folder that was written out its name; it is whole and on the disk when this returns."""
    for path in (*scratch.iterdir(), scratch):
        sync(path)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    sync(target.parent)


def find_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood when the checkpoint was saved."""
    try:
        return Progress(**json.loads((checkpoint / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise damaged(checkpoint / "state.json", error) from error


def restore_optimizer(checkpoint: Path, optimizer: Updater) -> None:
    """Put the saved optimizer state back, bit for bit."""
    try:
        saved = load_file(checkpoint / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise damaged(checkpoint / "optimizer.safetensors", error) from error
    optimizer.restore(saved)


def damaged(path: Path, error: BaseException) -> TrainingError:
    """What is raised for a file of a run that cannot be read."""
    return TrainingError(f"{path}: not readable ({first_line(error)}).\nThe run cannot be resumed: choose another --output and start it again.")
