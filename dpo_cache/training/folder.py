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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.store.local import free_bytes
from dpo_cache.train_options import complete_config
from dpo_cache.training.checkpoint import damaged, find_checkpoints, publish_folder

# What may differ between a run and its resumption: it changes speed, memory or what is reported, not the result.
FREE_TO_CHANGE = {"resume", "trust_remote_code", "cache", "output", "device", "micro_tokens", "gradient_checkpointing", "eval_every", "save_every"}
RUN_FILES = {"config.json", "metrics.jsonl", "checkpoints", "model", ".model.tmp"}
FIXED_RESOLVED = ("reference", "pairs_digest", "num_pairs", "total_steps", "precision")


def find_start(folder: Path, say: Callable[[str], None], *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None for a run that starts at the beginning.

    Raises `TrainingError` where the folder does not fit.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder}: not a folder.\nChoose another --output.")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not present:
        if resume:
            raise TrainingError(f"{folder}: there is no run to resume.\nRun without --resume to start one.")
        return None
    if not resume:
        raise TrainingError(f"{folder}: not an empty folder.\nGo on with --resume, or choose another --output.")
    if not present <= RUN_FILES:
        raise TrainingError(f"{folder}: not the folder of a run; it holds {', '.join(sorted(present - RUN_FILES)[:5])}.\nChoose another --output.")
    if "model" in present:
        raise TrainingError(f"{folder}: this run is finished; its model lies in {folder / 'model'}.\nChoose another --output to train again.")
    checkpoints = find_checkpoints(folder)
    if not checkpoints:
        say(f"{folder}: cut off before its first checkpoint (--save-every N makes some); it starts again.")
        discard(folder)
        return None
    return checkpoints[-1]


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """RUN/config.json of a new run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise TrainingError(f"cannot write {folder / 'config.json'}: {error.strerror or error}.\nChoose another --output.") from error


def discard(folder: Path) -> None:
    """Empty the folder of a run that did not come to its first update or checkpoint, so that it can be started anew."""
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", ".model.tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise `TrainingError` naming what a resumed run changes, if that would change its result."""
    before, config = complete_config(_read_config(folder)), json.loads(json.dumps(config))
    resolved = before["resolved"]
    both = [(name, before.get(name), config[name]) for name in config if name not in FREE_TO_CHANGE and name != "resolved"]
    both += [(name, resolved.get(name), config["resolved"][name]) for name in FIXED_RESOLVED]
    changed = [f"  {name}: {old} before, {new} now" for name, old, new in both if old != new]
    if changed:
        raise TrainingError("this run was started otherwise:\n" + "\n".join(changed) + "\nGive the same options, or choose another --output.")


def read_resolved(folder: Path) -> dict[str, Any]:
    """What became of the defaults of a run that was begun."""
    return _read_config(folder)["resolved"]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        dict(config["resolved"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(folder / "config.json", error) from error
    return config


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
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise TrainingError(f"cannot save {target}: {first_line(error)}.\nFree some space, then go on with --resume.") from error
    drop_checkpoints(folder)


def drop_checkpoints(folder: Path) -> None:
    """Remove what only a resumption needs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
