"""The run's folder: its config.json, its models, and the conditions for resuming it.

RUN/
  config.json      every option, and under `resolved` the values in place of `auto` and other defaults
  metrics.jsonl    one line for each step or evaluation
  samples.jsonl    the policy's answers, see `samples.py`
  trackers.json    the ids of this run in its trackers, see `trackers.py`; and tensorboard/
  checkpoints/     see `checkpoint.py`; gone when the run is finished
  best/            the policy at the best evaluation, if that was not the last one, and `best.json`: its
                   step and value
  model/           the trained policy with its tokenizer: a model, or an adapter with its config
  .claim.tmp       the claim of the process that works here, see `files/claim.py`

config.json is written first and removed last. best/ may be newer than the last checkpoint; then the policy
that the checkpoint names as the best is in the checkpoint, from where a resumed run takes it back. While
model/ contains a best.json, the run has not ended: best/ is still to be removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import refused_writes, remove, write_whole
from dpo_cache.files.sync import sync
from dpo_cache.lm.model.adapter_weights import restore_adapter
from dpo_cache.options.run_config import complete_config
from dpo_cache.options.train import WHOLE_LR, TrainOptions
from dpo_cache.training.inputs import TrainedModel
from dpo_cache.training.output.checkpoint import damaged, read_position, write_policy
from dpo_cache.training.output.disk import check_space, needed_bytes
from dpo_cache.training.output.model_card import write_card
from dpo_cache.training.output.run_start import (
    BEFORE_MODEL,
    BEST_FILE,
    find_checkpoints,
    remove_scratch,
)
from dpo_cache.training.ranks import Ranks

# Options that may differ when a run is resumed: they change speed, memory or reports, but not the result.
# fmt: off
FREE_TO_CHANGE = {
    "resume", "config", "trust_remote_code", "cache", "output", "device", "budget_tokens",
    "gradient_checkpointing", "memory", "place", "offload_activations", "free_gradients", "eval_every",
    "save_every", "keep", "sample", "log_to", "log_names", "step_zero", "dry_run", "parallel", "launch",
}
# fmt: on
FIXED_RESOLVED = (
    "base_weights",
    "reference",
    "pairs_digest",
    "shuffled_blocks",
    "reference_values",
    "num_pairs",
    "eval_pairs_digest",
    "eval_reference_values",
    "total_steps",
    "precision",
    "clips",
)
RESUME = "Then resume the run with `resume`."


def begin_folder(folder: Path, config: dict[str, Any]) -> None:
    """Write RUN/config.json of a new run, which may replace a run that ended before its first checkpoint.

    Its best/ stays until the first evaluation replaces it, unless the new run has other options.
    """
    path = folder / "config.json"
    with refused_writes(path, TrainingError, "Or choose another `output`."):
        if (folder / "best").exists() and _is_other(folder, config):
            remove(folder / "best")
        _empty(folder, keep={"best", "config.json"})
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(config, indent=2) + "\n")


def discard(folder: Path) -> None:
    """Empty the folder of a run that ends before its first update; best/ of an earlier attempt stays."""
    with suppress(OSError):  # only the error that ended the run is reported
        has_best = (folder / "best").exists()
        _empty(folder, keep={"best", "config.json"})
        if not has_best:
            remove(folder / "config.json")


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise `TrainingError` naming the options of a resumed run that would change its result.

    `config["resolved"]` may have only those resolved values that are known already.
    """
    if changed := changed_options(folder, config):
        raise TrainingError(
            "this run was started with other options:\n"
            + "\n".join(changed)
            + "\nGive the same options, or choose another `output`."
        )


def changed_options(folder: Path, config: dict[str, Any]) -> list[str]:
    """A line for each option of the run that has another value in the config. Raises `TrainingError`."""
    before, config = complete_config(read_config(folder)), json.loads(json.dumps(config))
    if config["lr"] is None and "lr" not in before["resolved"] and before["lr"] == WHOLE_LR:
        before["lr"] = None  # the default of earlier versions, which the run keeps
    resolved, now = before["resolved"], config["resolved"]
    free = FREE_TO_CHANGE | {"resolved"}
    if config["patience"] or before.get("eval_every") is not None:
        free -= {"eval_every"}  # patience and best/ depend on the evaluations
    both = [(name, before.get(name), config[name]) for name in config if name not in free]
    # earlier versions recorded fewer of them
    both += [(name, resolved[name], now[name]) for name in FIXED_RESOLVED if name in resolved and name in now]
    return [f"  {name}: {old} before, {new} now" for name, old, new in both if old != new]


def read_config(folder: Path) -> dict[str, Any]:
    """RUN/config.json. Raises `TrainingError`."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        dict(config["resolved"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise damaged(folder / "config.json", error) from error
    return config


def check_disk(folder: Path, policy: TrainedModel, options: TrainOptions) -> int:
    """The bytes that the run writes. Raises `TrainingError` if they do not fit, before the training."""
    model, towers = policy.model, policy.left_out.num_bytes if policy.left_out else 0
    needed = needed_bytes(
        options,
        trained=sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        whole=sum(parameter.nbytes for parameter in model.parameters()),
        towers=towers,
        is_sharded=policy.sharded is not None,
    )
    check_space(folder, needed)
    return needed


def save_best(
    folder: Path, policy: TrainedModel, found: Mapping[str, Any], card: str, ranks: Ranks | None = None
) -> None:
    """Write RUN/best with its model card. An earlier best/ that the last checkpoint names moves into the
    checkpoint.

    All `ranks` call this.
    """

    def write(scratch: Path) -> None:
        write_card(scratch, card)
        (scratch / BEST_FILE).write_text(json.dumps(found) + "\n")

    def keep_named() -> None:
        checkpoints = find_checkpoints(folder)
        named = read_position(checkpoints[-1]).best if checkpoints else None
        if named and named.get("step") is not None and _best_step(best) == named["step"]:
            with refused_writes(best, TrainingError, RESUME):
                _move(best, checkpoints[-1] / "best")

    ranks, best = ranks or Ranks(), folder / "best"
    ranks.on_main(keep_named)
    remedy = "Then resume from the last checkpoint with `resume`."
    write_policy(best, policy, write, remedy=remedy, ranks=ranks)


def restore_best(folder: Path, checkpoint: Path, named: Mapping[str, Any]) -> bool:
    """Make best/ the policy that the checkpoint names as the best. Returns False if that policy is lost.

    A best/ that was saved after the checkpoint is replaced only by the one that the checkpoint names.
    """
    best, kept = folder / "best", checkpoint / "best"
    if named["step"] is None or _best_step(best) == named["step"]:
        return True
    with refused_writes(best, TrainingError, RESUME):
        if _best_step(kept) == named["step"]:
            remove(best)
            _move(kept, best)
            return True
        if best.is_dir() and not (best / BEST_FILE).exists():  # earlier versions removed it too early
            found = {name: value for name, value in named.items() if name != "num_worse"}
            write_whole(best / BEST_FILE, json.dumps(found) + "\n")
            return True
    return False


def save_model(
    folder: Path,
    policy: TrainedModel,
    card: str,
    *,
    best_step: int | None,
    drops_best: bool,
    is_merged: bool,
    ranks: Ranks | None = None,
) -> None:
    """Write RUN/model with its card, completely or not at all, with the weights of best/ if `best_step` is
    given.

    With `drops_best`, `remove_leftovers` then removes best/. All `ranks` call this. Raises `TrainingError`.
    """
    ranks, best, target = ranks or Ranks(), folder / "best", folder / "model"
    if best_step is not None:
        ranks.on_main(partial(_check_best, best, best_step))
    # shards cannot take an adapter's weights from a file
    if best_step is not None and (policy.adapted is None or policy.sharded is not None):
        ranks.on_main(partial(_publish_best, best, target))
        return
    if best_step is not None and policy.adapted is not None:
        restore_adapter(policy.adapted, str(best))
    if is_merged and policy.adapted is not None:
        policy = replace(policy, model=policy.adapted.merge_and_unload(), adapted=None)

    def write(scratch: Path) -> None:
        write_card(scratch, card)
        if drops_best and best.exists():
            (scratch / BEST_FILE).write_text("{}\n")

    write_policy(target, policy, write, remedy=RESUME, ranks=ranks)


def _check_best(best: Path, step: int) -> None:
    if _best_step(best) != step:
        raise TrainingError(
            f"{best}: expected the policy of the best evaluation, after step {step}; it is not there.\n"
            "Resume the run with `resume`: it then takes the best of the evaluations from there on."
        )


def _publish_best(best: Path, target: Path) -> None:
    with refused_writes(target, TrainingError, RESUME):
        _move(best, target)


def _best_step(best: Path) -> int | None:
    """The step of the policy in a best/; None if there is none, or if its best.json is not readable."""
    try:
        return json.loads((best / BEST_FILE).read_bytes())["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _is_other(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether the folder's run had other options; True if its config.json cannot be read."""
    try:
        return bool(changed_options(folder, config))
    except TrainingError:
        return True


def _empty(folder: Path, *, keep: set[str]) -> None:
    """Remove the files of a run without a model, except those in `keep`."""
    if folder.exists():
        for name in sorted(BEFORE_MODEL - keep):
            remove(folder / name)
        remove_scratch(folder)


def _move(old: Path, new: Path) -> None:
    old.rename(new)
    sync(new.parent)
    sync(old.parent)
