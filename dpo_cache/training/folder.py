"""The run's folder: what may be in it before, its config.json, and its model.

RUN/
  config.json      every option, and under `resolved` what became of the defaults
  metrics.jsonl    one line a step or evaluation
  checkpoints/     see `checkpoint.py`; gone when the run is finished
  model/           the trained policy with its tokenizer
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import TrainingError
from dpo_cache.store.files import free_bytes
from dpo_cache.training.checkpoint import find_checkpoints, publish_folder

# What may differ between a run and its resumption: it changes speed, memory or what is reported, not the result.
FREE_TO_CHANGE = {"resume", "trust_remote_code", "cache", "output", "device", "micro_tokens", "gradient_checkpointing", "eval_every", "save_every"}
FIXED_RESOLVED = ("reference", "pairs_digest", "num_pairs", "total_steps", "precision")


def find_start(folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None for a new run. Raises `TrainingError` where the folder does not fit."""
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise TrainingError(f"{folder}: not an empty folder.\nGo on with --resume, or choose another --output.")
        return None
    checkpoints = find_checkpoints(folder)
    if checkpoints:
        return checkpoints[-1]
    if (folder / "model").exists():
        raise TrainingError(f"{folder}: this run is finished; its model lies in {folder / 'model'}.\nChoose another --output to train again.")
    raise TrainingError(f"{folder}: no checkpoint to resume from.\nRun without --resume, and with --save-every N to have some.")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """RUN/config.json of a new run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"cannot write {folder / 'config.json'}: {error.strerror or error}.\nChoose another --output.") from error


def discard(folder: Path) -> None:
    """Take a run's folder away again that failed before its first update, so that it can be started anew."""
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise `TrainingError` naming what a resumed run changes, if that would change its result."""
    before = json.loads((folder / "config.json").read_text())
    both = [(name, before.get(name), config[name]) for name in config if name not in FREE_TO_CHANGE and name != "resolved"]
    both += [(name, before["resolved"].get(name), config["resolved"][name]) for name in FIXED_RESOLVED]
    changed = [f"  {name}: {old} before, {new} now" for name, old, new in both if old != new]
    if changed:
        raise TrainingError("this run was started otherwise:\n" + "\n".join(changed) + "\nGive the same options, or choose another --output.")


def check_disk(folder: Path, model: PreTrainedModel, *, saves_checkpoints: bool) -> None:
    """Raise `TrainingError` before a training whose result could not be written."""
    model_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = model_bytes * (7 if saves_checkpoints else 1)  # weights and two moments, of two checkpoints for a moment
    free = free_bytes(folder)
    if needed > free:
        raise TrainingError(
            f"{folder}: {needed / 1e9:.1f} GB are needed for the model and its checkpoints, {free / 1e9:.1f} GB are free.\n"
            "Free some space or choose another --output."
        )


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """RUN/model, whole or absent; the checkpoints have served then."""
    scratch, target = folder / ".model.tmp", folder / "model"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        publish_folder(scratch, target)
    except OSError as error:
        raise TrainingError(f"cannot save {target}: {error.strerror or error}.\nFree some space, then go on with --resume.") from error
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
