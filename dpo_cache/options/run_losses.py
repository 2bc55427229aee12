"""The loss settings of a training run, for an evaluation of its model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.losses.terms import SETTINGS, is_served, loss_terms
from dpo_cache.options.base import flag_of, with_new_names
from dpo_cache.options.evaluate import EvalOptions
from dpo_cache.options.losses import LossOptions
from dpo_cache.options.run_config import complete_config

MODEL_FOLDERS = ("model", "best")  # of a run
DEPENDS_ON = {"f_alpha": "f_divergence", "ld_reference": "ld_alpha"}  # meaningless under another value


def with_run(given: dict[str, Any], log: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The given options of `eval`, completed with loss settings and model of the run that `run` names.

    Without `run`, the run is found if the model is its model/ or best/, with a remark. Raises `OptionError`.
    """
    given = {
        name: value
        for name, value in with_new_names(EvalOptions, given, log).items()
        if value is not None or name not in ("run", "model")
    }
    if "run" not in given:
        run = _run_of(given.get("model"))
        if run is None:
            return given
        chosen = {entry.name for entry in fields(LossOptions)} & given.keys()
        given = {**_settings_of(run, given), **given, "run": str(run)}
        losses = LossOptions(
            **{entry.name: given[entry.name] for entry in fields(LossOptions) if entry.name in given}
        )
        shown = describe_losses(losses.loss, {name: getattr(losses, name) for name in SETTINGS})
        others = " where no others are given" if chosen else ""
        log(f"{given['model']} is the model of a run, whose loss settings are used{others}: {shown}.")
        return given
    run = Path(given["run"])
    if read_run(run) is None:
        raise OptionError(
            f"`run` {run}: not the folder of a training run (no config.json of `dpo-cache train`).\n"
            "Give the folder that was the `output` of `dpo-cache train`."
        )
    if "model" not in given and not (run / "model").is_dir():
        raise OptionError(
            f"`run` {run}: it has no model yet.\n"
            f"Finish it with `dpo-cache train --resume {run}`, or give `model`."
        )
    return {"model": str(run / "model"), **_settings_of(run, given), **given}


def read_run(folder: Path) -> dict[str, Any] | None:
    """A run's config.json with the names and defaults of this version; None if the folder has none."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    return complete_config(found) if isinstance(found, dict) and "resolved" in found else None


def describe_losses(loss: Sequence[str], settings: Mapping[str, Any]) -> str:
    """The losses and their settings in one line: `sigmoid, beta 0.1`."""
    names = tuple(loss_terms(loss))
    shown = [
        f"{name} {settings[name]}"
        for name, entry in SETTINGS.items()
        if settings[name] != entry.default or (name == "beta" and is_served("beta", names))
    ]
    return ", ".join([" + ".join(loss), *shown])


def loss_arguments(losses: LossOptions) -> list[str]:
    """The arguments of `eval` that repeat these losses and settings, those at their defaults left out, except
    loss and beta: `--loss ipo --beta 0.1`.
    """
    arguments = [word for loss in losses.loss for word in ("--loss", loss)]
    for name, entry in SETTINGS.items():
        value = getattr(losses, name)
        if value == entry.default and not (
            name == "beta" and is_served(name, tuple(loss_terms(losses.loss)))
        ):
            continue
        if isinstance(value, bool):
            yes, _, no = entry.metadata["flag"].partition("/")
            arguments.append(yes if value else no)
        else:
            arguments += [flag_of(entry), str(value)]
    return arguments


def _run_of(model: Any) -> Path | None:
    """The run that the model is from, if it is the model/ or best/ of one."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    for folder in (Path(model), Path(model).resolve()):  # it may be "." or a link
        if folder.name in MODEL_FOLDERS and folder.is_dir() and read_run(folder.parent) is not None:
            return folder.parent
    return None


def _settings_of(run: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The loss settings of the run, except settings that have no meaning with the given options."""
    config = read_run(run) or {}
    settings = {entry.name: config[entry.name] for entry in fields(LossOptions)}
    try:
        LossOptions(**settings).check_losses()
    except OptionError as error:
        raise OptionError(f"{run / 'config.json'}: {error}") from error
    if "loss" in given:
        names = tuple(loss_terms((given["loss"],) if isinstance(given["loss"], str) else given["loss"]))
        settings = {name: value for name, value in settings.items() if name in SETTINGS}
        settings = {name: value for name, value in settings.items() if is_served(name, names)}
    return {name: value for name, value in settings.items() if DEPENDS_ON.get(name) not in given}
