"""The run's folder: its config.json, its models, and when it can be resumed.

RUN/
  config.json      every option, and under `resolved` the values in place of `auto` and other defaults
  metrics.jsonl    one line a step or evaluation
  samples.jsonl    the policy's answers, see `samples.py`
  trackers.json    which run of which tracker this is, see `trackers.py`; and tensorboard/
  checkpoints/     see `checkpoint.py`; gone when the run is finished
  best/            the policy at the best evaluation, where that was not the last one, and `best.json`: its
                   step and value
  model/           the trained policy with its tokenizer: a model, or an adapter with its config
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import is_scratch, refused_writes, remove, write_whole
from dpo_cache.files.sync import sync
from dpo_cache.lm.model.adapter_weights import restore_adapter
from dpo_cache.options.run_config import complete_config
from dpo_cache.options.train import TrainOptions
from dpo_cache.store.folders.local import free_bytes
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.output.checkpoint import damaged, write_policy
from dpo_cache.training.output.model_card import write_card
from dpo_cache.training.output.run_start import BEFORE_MODEL

# Options that may differ when a run is resumed: they change speed, memory or reports, but not the result.
# fmt: off
FREE_TO_CHANGE = {
    "resume", "config", "trust_remote_code", "cache", "output", "device", "budget_tokens",
    "gradient_checkpointing", "offload_activations", "free_gradients", "eval_every", "save_every", "keep",
    "sample", "log_to", "log_names", "step_zero", "dry_run",
}
# fmt: on
BEST_FILE = "best.json"
FIXED_RESOLVED = ("base_weights", "reference", "pairs_digest", "num_pairs", "total_steps", "precision")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write RUN/config.json of a new run."""
    path = folder / "config.json"
    with refused_writes(path, TrainingError, "Or choose another `output`."):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(config, indent=2) + "\n")


def discard(folder: Path) -> None:
    """Empty the folder of a run that ended before its first update or checkpoint; it can start again."""
    if not folder.exists():
        return
    for path in list(folder.iterdir()):
        if path.name in BEFORE_MODEL or is_scratch(path.name):
            remove(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise `TrainingError` naming the options of a resumed run that would change its result."""
    before, config = complete_config(read_config(folder)), json.loads(json.dumps(config))
    resolved = before["resolved"]
    free = FREE_TO_CHANGE | {"resolved"}
    if config["patience"] or before.get("eval_every") is not None:
        free -= {"eval_every"}  # patience counts evaluations, and best/ is of one of them
    both = [(name, before.get(name), config[name]) for name in config if name not in free]
    both += [(name, resolved.get(name), config["resolved"][name]) for name in FIXED_RESOLVED]
    changed = [f"  {name}: {old} before, {new} now" for name, old, new in both if old != new]
    if changed:
        raise TrainingError(
            "this run was started otherwise:\n"
            + "\n".join(changed)
            + "\nGive the same options, or choose another `output`."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """RUN/config.json. Raises `TrainingError`."""
    try:
        config = json.loads((folder / "config.json").read_text())
        dict(config["resolved"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(folder / "config.json", error) from error
    return config


def check_disk(folder: Path, model: PreTrainedModel, options: TrainOptions) -> None:
    """Raise `TrainingError` before a training whose result could not be written."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    # A checkpoint is weights and two moments; for a moment there is one more than are kept.
    num_checkpoints = options.keep + 1 if options.save_every and options.keep else 0
    keeps_best = options.eval_every is not None
    needed = trained * (3 * num_checkpoints + keeps_best) + (whole if options.merge_adapter else trained)
    free = free_bytes(folder)
    if free is not None and needed > free:
        raise TrainingError(
            f"{folder}: {needed / 1e9:.3g} GB are needed for the model and its checkpoints, "
            f"{free / 1e9:.3g} GB are free.\n"
            "Free some space or choose another `output`."
        )


def save_best(folder: Path, policy: TrainedModel, found: dict[str, Any], card: str) -> None:
    """Write RUN/best with its model card, in place of an earlier one."""

    def write(scratch: Path) -> None:
        write_card(scratch, card)
        (scratch / BEST_FILE).write_text(json.dumps(found) + "\n")

    write_policy(
        folder / "best",
        policy,
        write,
        remedy="Then resume from the last checkpoint with `resume`.",
    )


def save_model(folder: Path, policy: TrainedModel, card: str, *, takes_best: bool, is_merged: bool) -> None:
    """Write RUN/model with its card, whole or not at all; `takes_best`: with the best weights."""
    best = folder / "best"
    if takes_best and policy.adapted is not None:
        restore_adapter(policy.adapted, str(best))
    if is_merged and policy.adapted is not None:
        policy = replace(policy, model=policy.adapted.merge_and_unload(), adapted=None)
    if takes_best and policy.adapted is None and not is_merged:
        (best / BEST_FILE).unlink()
        best.rename(folder / "model")
        sync(folder)
    else:
        write_policy(
            folder / "model",
            policy,
            lambda scratch: write_card(scratch, card),
            remedy="Then resume the run with `resume`.",
        )
    drop_checkpoints(folder)


def drop_best(folder: Path) -> None:
    """Remove best/, whose policy is the one in model/."""
    shutil.rmtree(folder / "best", ignore_errors=True)


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints, which only a resumed run needs."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
