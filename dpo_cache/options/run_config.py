"""The options in a run's config.json, read to resume the run or to start another one like it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.options.base import with_new_names
from dpo_cache.options.train import TrainOptions
from dpo_cache.options.trl_config import options_of_trl

MUTUALLY_EXCLUSIVE = (
    ("eval_pairs", "eval_fraction"),
    ("lora_r", "peft_config"),
    ("lora_alpha", "peft_config"),
    ("warmup_ratio", "warmup_steps"),
)
NOT_FROM_CONFIG = ("output", "resume", "dry_run", "config", "trl_config", "resolved")


def with_config(
    given: dict[str, Any], log: Callable[[str], None] = lambda _: None, *, num_launched: int = 1
) -> dict[str, Any]:
    """The given options, completed from a run's config.json if `resume` names a run or `config` a file, or
    from the DPOConfig that `trl_config` names.

    `output`, `resume` and `dry_run` are never read from a config.json, and `trust_remote_code` only from that
    of the run to resume: somebody else may have written a file. `num_launched` is how many processes a
    launcher has started, for the batch size of a DPOConfig. `log` gets a remark for each option that is given
    under an earlier name. Raises `OptionError`, and `TrainingError` if there is no run to resume.
    """
    given = with_new_names(TrainOptions, given, log)
    if isinstance(given.get("resume"), (str, os.PathLike)):
        return _with_config_of_run(given, Path(given["resume"]))
    if given.get("resume") and given.get("output") is None:
        raise OptionError(
            "`resume` without a folder continues the run in `output`, which is not given.\n"
            "Give the folder of the run, as in `dpo-cache train --resume RUN`."
        )
    if given.get("trl_config") is not None:
        return _with_trl_config(given, log, num_launched)
    if given.get("config") is None:
        return given
    name = f"`config` {given['config']}"
    completed = _completed(given, Path(given["config"]), name)
    if completed.get("trust_remote_code") and not given.get("trust_remote_code"):
        log(f"{name}: its `trust_remote_code` is not used. Give it again to run Python code of the model.")
        completed["trust_remote_code"] = False
    return completed


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json as this version writes it: options have their current names, later options their
    defaults, and `loss` is a list.
    """
    defaults = {entry.name: entry.default for entry in fields(TrainOptions)}
    config = with_new_names(TrainOptions, config)
    loss = config.get("loss", ["sigmoid"])
    return {**defaults, **config, "loss": [loss] if isinstance(loss, str) else loss}


def evaluation_name(config: Mapping[str, Any]) -> str:
    """`held out`, or `evaluation` where the run trains on prompts of its evaluation pairs, or may do so.

    `config` is a run's config.json. Earlier versions did not count the shared pairs.
    """
    num_shared = config.get("resolved", {}).get("num_shared_eval_pairs")
    return "held out" if num_shared == 0 or config.get("eval_fraction") else "evaluation"


def _with_config_of_run(given: dict[str, Any], run: Path) -> dict[str, Any]:
    output = given.get("output")
    if output is not None and Path(output) != run:
        raise OptionError(
            f"`resume` {run} and `output` {output}: a run is resumed in its own folder.\nGive one of them."
        )
    for file in ("config", "trl_config"):
        if given.get(file) is not None:
            raise OptionError(
                f"`resume` {run} and `{file}` {given[file]}: a run is resumed with its own config.json.\n"
                f"Leave `{file}` out."
            )
    if not (run / "config.json").is_file():
        raise TrainingError(
            f"{run}: there is no run to resume (no config.json).\n"
            "Give the folder of a run, or start one without `resume`."
        )
    completed = _completed(given, run / "config.json", str(run / "config.json"))
    return {**completed, "output": str(run), "resume": True}


def _completed(given: dict[str, Any], path: Path, name: str) -> dict[str, Any]:
    """The given options, completed from the file. Messages call the file `name`."""
    return _overridden(_read(path, name), given, name)


def _with_trl_config(given: dict[str, Any], log: Callable[[str], None], num_launched: int) -> dict[str, Any]:
    """The given options, completed from a DPOConfig of TRL. The result no longer names the file."""
    given = dict(given)
    path = Path(given.pop("trl_config"))
    if given.get("config") is not None:
        raise OptionError(f"`trl_config` {path} and `config` {given['config']}: give one of them.")
    found = options_of_trl(path, given, given.get("launch") or num_launched, log)
    names = ("eval_pairs", "eval_fraction")
    evaluated: dict[str, Any] = {option: given[option] for option in names if option in given}
    return _overridden(found, given, f"`trl_config` {path}", evaluated)


def _overridden(
    found: dict[str, Any], given: dict[str, Any], name: str, needed: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The options found in a file, overridden by the given ones. Messages call the file `name`.

    `needed` are given options without which those of the file make no sense.
    """
    try:
        TrainOptions(**{**found, **needed, "cache": found.get("cache") or "-", "output": "-"})
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error
    for pair in MUTUALLY_EXCLUSIVE:  # the given one replaces the other
        if any(given.get(option) is not None for option in pair):
            found = {option: value for option, value in found.items() if option not in pair}
    return {**found, **given}


def _read(path: Path, name: str) -> dict[str, Any]:
    """The options in the file, under their current names."""
    try:
        content = json.loads(path.read_bytes())
        content.items()
    except (OSError, ValueError, AttributeError) as error:
        detail = error.strerror if isinstance(error, OSError) else "not a JSON object"
        raise OptionError(f"{name}: not readable ({detail}).\nGive the config.json of a run.") from error
    found = {
        option: value
        for option, value in with_new_names(TrainOptions, content).items()
        if option not in NOT_FROM_CONFIG
    }
    if unknown := sorted(set(found) - {entry.name for entry in fields(TrainOptions)}):
        raise OptionError(
            f"{name}: {', '.join(unknown)}: no options of this version of dpo-cache train.\n"
            "Give the config.json of a run."
        )
    return found
