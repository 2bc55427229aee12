"""The folder of a sweep.

SWEEP/
  sweep.json              the grid, and the folder of each of its runs
  table.csv, table.md     the comparison, rewritten after every run
  logs/NAME.log           the output of each run, with its command
  logs/NAME.json          the report of each run
  NAME/                   a run, as `dpo-cache train` makes it
  .claim.tmp              the claim of the sweep that works here, see `files/claim.py`

`sweep.json`: {"format": "dpo-cache sweep", "version": 1, "cache": ..., "shared": {option: value},
"varied": {option: [values]}, "runs": [{"name": ..., "options": {option: value}}]}; `options` of a run are
the varied ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.files import atomic
from dpo_cache.files.claim import Claim, claimed
from dpo_cache.log import Log
from dpo_cache.options.base import with_new_names
from dpo_cache.options.sweep import shown_value, swept_fields
from dpo_cache.options.train import TrainOptions
from dpo_cache.sweeping.grid import Grid, run_names
from dpo_cache.training.output.run_start import is_begun

FORMAT = {"format": "dpo-cache sweep", "version": 1}
HOLDER = "another sweep is running here, or a run of a sweep that was killed"
OLD_LOCK = ".lock"  # the lock file of earlier versions


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder, the shared options and the varied ones."""

    name: str
    folder: Path
    log: Path
    shared: dict[str, Any]
    varied: dict[str, Any]

    @property
    def is_finished(self) -> bool:
        return (self.folder / "model").is_dir()

    @property
    def report_file(self) -> Path:
        return self.log.with_suffix(".json")

    @property
    def is_begun(self) -> bool:
        return is_begun(self.folder)


def plan_runs(output: Path, cache: str, grid: Grid, *, resume: bool) -> list[Run]:
    """The runs of the grid, in its order; runs that the folder has keep their names. Writes sweep.json.

    Raises `TrainingError` unless the folder is new, or belongs to this sweep or a part of it.
    """
    kept = {}
    if before := _read_plan(output, resume=resume):
        _check_extends(output, before, grid)
        kept = {_key(grid, {**before["shared"], **run["options"]}): run["name"] for run in before["runs"]}
    combinations = grid.combinations()
    runs = []
    for combination, new_name in zip(combinations, run_names(combinations), strict=True):
        name = kept.get(_key(grid, combination), new_name)
        runs.append(Run(name, output / name, output / "logs" / f"{name}.log", grid.shared, combination))
    content = {
        **FORMAT,
        "cache": cache,
        "shared": grid.shared,
        "varied": grid.varied,
        "runs": [{"name": run.name, "options": run.varied} for run in runs],
    }
    write_whole(output / "sweep.json", json.dumps(content, indent=2) + "\n")
    return runs


def with_plan(given: dict[str, Any]) -> dict[str, Any]:
    """The given options of a sweep, completed from the sweep.json of the folder that `resume` names.

    Raises `OptionError`, and `TrainingError` if there is no sweep to resume.
    """
    if not isinstance(given.get("resume"), (str, os.PathLike)):
        if given.get("resume") and given.get("output") is None:
            raise OptionError(
                "`resume` without a folder continues the sweep in `output`, which is not given.\n"
                "Give the folder of the sweep, as in `dpo-cache sweep --resume SWEEP`."
            )
        return given
    folder, output = Path(given["resume"]), given.get("output")
    if output is not None and Path(output) != folder:
        raise OptionError(
            f"`resume` {folder} and `output` {output}: a sweep is resumed in its own folder.\n"
            "Give one of them."
        )
    plan = _read_plan(folder, resume=True)
    assert plan is not None
    values = {**{name: [value] for name, value in plan["shared"].items()}, **plan["varied"]}
    found = {name: tuple(map(_escaped, several)) for name, several in values.items()}
    return {**found, "cache": plan["cache"], **given, "output": str(folder), "resume": True}


@contextmanager
def hold_folder(output: Path, log: Log) -> Iterator[Claim]:
    """Keep other sweeps out of the folder while this one, or a run that inherited its claim, is alive.

    Raises `TrainingError`.
    """
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output}: not a folder.\nChoose another `output`.")
    with claimed(output, TrainingError, HOLDER, log) as claim:
        yield claim


def read_report(run: Run) -> dict[str, Any] | None:
    """The report of the run; None if it has not ended."""
    try:
        return json.loads(run.report_file.read_bytes())
    except (
        FileNotFoundError,
        json.JSONDecodeError,
    ):  # empty during the run, and if it was killed
        return None


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically. Raises `TrainingError`."""
    with atomic.refused_writes(path, TrainingError, "Then give the same command again."):
        atomic.write_whole(path, text)


def _read_plan(output: Path, *, resume: bool) -> dict[str, Any] | None:
    """sweep.json, with options of later versions at their defaults; None in a new folder."""
    path = output / "sweep.json"
    if not path.exists():
        if resume:
            raise TrainingError(f"{output}: there is no sweep to resume.\nRun without `resume` to start one.")
        names = sorted(entry.name for entry in output.iterdir())
        if others := [name for name in names if name != OLD_LOCK and not atomic.is_scratch(name)]:
            raise TrainingError(
                f"{output}: not an empty folder, nor that of a sweep; it holds {', '.join(others[:5])}.\n"
                "Choose another `output`."
            )
        return None
    try:
        plan = json.loads(path.read_bytes())
        if plan["format"] != FORMAT["format"]:
            raise ValueError("not that of a sweep")
        version, plan = plan["version"], _with_new_names(plan)
        names = [run["name"] for run in plan["runs"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{path}: not readable ({type(error).__name__}: {error}).\nChoose another `output`."
        ) from error
    if version != FORMAT["version"]:
        raise TrainingError(
            f"{path}: made by a newer dpo-cache (version {version}, this one reads 1).\n"
            "Choose another `output`."
        )
    if wrong := [name for name in names if Path(name).name != name]:
        raise TrainingError(f"{path}: {wrong[0]!r} is no name of a folder.\nChoose another `output`.")
    defaults = {entry.name: entry.default for entry in swept_fields() if entry.name not in plan["varied"]}
    return {**plan, "shared": json.loads(json.dumps(defaults)) | plan["shared"]}


def _escaped(value: Any) -> Any:
    """The value of an option in the form that `sweep` expects, where a comma in text separates values."""
    return value.replace(",", "\\,") if isinstance(value, str) else value


def _with_new_names(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of an earlier version with the current names of options."""
    renamed = partial(with_new_names, TrainOptions)
    runs = [{**run, "options": renamed(run["options"])} for run in plan["runs"]]
    return {**plan, "shared": renamed(plan["shared"]), "varied": renamed(plan["varied"]), "runs": runs}


def _check_extends(output: Path, before: dict[str, Any], grid: Grid) -> None:
    """Raise `TrainingError` naming every option whose earlier values the grid lacks."""
    changed = []
    for name in (*before["varied"], *before["shared"]):
        old = before["varied"].get(name, [before["shared"].get(name)])
        new = json.loads(json.dumps(grid.values(name))) if name in grid.shared or name in grid.varied else []
        is_free = len(old) == len(new) == 1 and name in _free_to_change(grid)
        if not is_free and any(value not in new for value in old):
            shown = [", ".join(map(shown_value, values)) or "unknown" for values in (old, new)]
            changed.append(f"  {name}: {shown[0]} before, {shown[1]} now")
    if changed:
        raise TrainingError(
            f"{output}: this sweep was started with other options:\n" + "\n".join(changed) + "\n"
            "More values add runs, but the earlier ones must be given, too. Give them, or choose another "
            "`output`."
        )


def _free_to_change(grid: Grid) -> set[str]:
    """Options that may have another value in a resumed run."""
    from dpo_cache.training.output.run_folder import FREE_TO_CHANGE

    # patience counts evaluations
    return FREE_TO_CHANGE if grid.values("patience") == (None,) else FREE_TO_CHANGE - {"eval_every"}


def _key(grid: Grid, options: dict[str, Any]) -> str:
    """The varied options of a run, as a key."""
    return json.dumps([options[name] for name in grid.varied])
