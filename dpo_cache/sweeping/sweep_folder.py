"""The folder of a sweep.

SWEEP/
  sweep.json              the grid, and which folder each of its runs has
  table.csv, table.md     the comparison, renewed after every run
  logs/NAME.log           what each run printed, with the command that began it
  logs/NAME.json          the report that it ended with
  NAME/                   a run, as `dpo-cache train` makes it

`sweep.json`: {"format": "dpo-cache sweep", "version": 1, "cache": ..., "shared": {option: value},
"varied": {option: [values]}, "runs": [{"name": ..., "options": {option: value}}]}; `options` of a run are
those that vary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.files import atomic
from dpo_cache.log import Log
from dpo_cache.options.base import with_new_names
from dpo_cache.options.sweep import default_of, shown_value, swept_fields
from dpo_cache.options.train import TrainOptions
from dpo_cache.sweeping.grid import Grid, run_names

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = {"format": "dpo-cache sweep", "version": 1}
LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its folder, every option that it shares, and those that vary."""

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
        return self.folder.is_dir() and any(self.folder.iterdir())


def plan_runs(output: Path, cache: str, grid: Grid, *, resume: bool) -> list[Run]:
    """The runs of the grid, in its order; those that the folder has keep their names. Writes sweep.json.

    Raises `TrainingError` where the folder is not that of this sweep, or of a part of it.
    """
    before = _read_plan(output, resume=resume)
    if before:
        _check_extends(output, before, grid)
    combinations = grid.combinations()
    kept = (
        {_key(grid, {**before["shared"], **run["options"]}): run["name"] for run in before["runs"]}
        if before
        else {}
    )
    names = [
        kept.get(_key(grid, combination), name)
        for combination, name in zip(combinations, run_names(combinations), strict=True)
    ]
    runs = [
        {"name": name, "options": combination} for name, combination in zip(names, combinations, strict=True)
    ]
    content = {**FORMAT, "cache": cache, "shared": grid.shared, "varied": grid.varied, "runs": runs}
    write_whole(output / "sweep.json", json.dumps(content, indent=2) + "\n")
    return [
        Run(name, output / name, output / "logs" / f"{name}.log", grid.shared, combination)
        for name, combination in zip(names, combinations, strict=True)
    ]


def with_plan(given: dict[str, Any]) -> dict[str, Any]:
    """The given options of a sweep and, if `resume` names a folder, the others as its sweep.json has them.

    Raises `TrainingError` where there is no sweep to resume.
    """
    if not isinstance(given.get("resume"), (str, os.PathLike)):
        return given
    folder, output = Path(given["resume"]), given.get("output")
    if output is not None and Path(output) != folder:
        raise OptionError(
            f"`resume` {folder} and `output` {output}: a sweep is resumed in its own folder.\n"
            "Give one of them."
        )
    plan = _read_plan(folder, resume=True)
    assert plan is not None
    found = {name: _as_given([value]) for name, value in plan["shared"].items()}
    found |= {name: _as_given(values) for name, values in plan["varied"].items()}
    return {**found, "cache": plan["cache"], **given, "output": str(folder), "resume": True}


@contextmanager
def hold_folder(output: Path, log: Log) -> Iterator[int | None]:
    """Keep other sweeps out of the folder while this one, or a run that it began, lives; gives the descriptor
    for the runs to inherit.

    None where the system or the file system has no locks. Raises `TrainingError`.
    """
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output}: not a folder.\nChoose another `output`.")
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TrainingError(
            f"cannot write {output}: {error.strerror or error}.\nChoose another `output`."
        ) from error
    try:
        yield descriptor if _lock(output, descriptor, log) else None
    finally:
        os.close(descriptor)
        if not (output / "sweep.json").exists():  # refused before it began
            (output / LOCK).unlink(missing_ok=True)
            if is_new:
                output.rmdir()


def read_report(run: Run) -> dict[str, Any] | None:
    """The report that the run ended with; None if it has not ended."""
    try:
        return json.loads(run.report_file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # empty while it runs, or where it was killed
        return None


def write_whole(path: Path, text: str) -> None:
    """Write a file that readers see whole, before or after. Raises `TrainingError`."""
    try:
        atomic.write_whole(path, text)
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}.\n"
            "Free some space, then give the same command again."
        ) from error


def _lock(output: Path, descriptor: int, log: Log) -> bool:
    try:
        if fcntl is None:
            raise OSError("no such locks on this system")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            f"{output}: another sweep is at work here, or a run that one left behind when it was killed.\n"
            "Wait for it, or choose another `output`."
        ) from error
    except OSError as error:
        log(
            f"{output} cannot be locked ({error.strerror or error}): see to it that no other sweep works "
            "there."
        )
        return False
    return True


def _read_plan(output: Path, *, resume: bool) -> dict[str, Any] | None:
    """sweep.json with the options that came later at their defaults; None in a new folder."""
    path = output / "sweep.json"
    if not path.exists():
        if resume:
            raise TrainingError(f"{output}: there is no sweep to resume.\nRun without `resume` to start one.")
        if others := sorted(entry.name for entry in output.iterdir() if entry.name != LOCK):
            raise TrainingError(
                f"{output}: not an empty folder, nor that of a sweep; it holds {', '.join(others[:5])}.\n"
                "Choose another `output`."
            )
        return None
    try:
        plan = json.loads(path.read_text())
        if plan["format"] != FORMAT["format"]:
            raise ValueError("not that of a sweep")
        version, plan = plan["version"], _with_new_names(plan)
        names = [run["name"] for run in plan["runs"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
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
    defaults = {entry.name: default_of(entry) for entry in swept_fields() if entry.name not in plan["varied"]}
    return {**plan, "shared": json.loads(json.dumps(defaults)) | plan["shared"]}


def _as_given(values: list[Any]) -> tuple[Any, ...]:
    """Values of an option as `sweep` takes them: a comma in text separates values."""
    return tuple(value.replace(",", "\\,") if isinstance(value, str) else value for value in values)


def _with_new_names(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan of an earlier version, with the options' names of now."""

    def renamed(options: dict[str, Any]) -> dict[str, Any]:
        return with_new_names(TrainOptions, dict(options))

    runs = [{**run, "options": renamed(run["options"])} for run in plan["runs"]]
    return {**plan, "shared": renamed(plan["shared"]), "varied": renamed(plan["varied"]), "runs": runs}


def _check_extends(output: Path, before: dict[str, Any], grid: Grid) -> None:
    """Raise `TrainingError` naming every option whose earlier values the grid lacks."""
    changed = []
    for name in (*before["varied"], *before["shared"]):
        old = before["varied"].get(name, [before["shared"].get(name)])
        new = json.loads(json.dumps(grid.values(name))) if name in grid.shared or name in grid.varied else []
        if any(value not in new for value in old) and not (
            len(old) == len(new) == 1 and name in _free_to_change(grid)
        ):
            shown = [", ".join(map(shown_value, values)) or "unknown" for values in (old, new)]
            changed.append(f"  {name}: {shown[0]} before, {shown[1]} now")
    if changed:
        raise TrainingError(
            f"{output}: this sweep was started otherwise:\n" + "\n".join(changed) + "\n"
            "More values add runs, but those of before must be given, too. Give them, or choose another "
            "`output`."
        )


def _free_to_change(grid: Grid) -> set[str]:
    """Options that a resumed run may be given otherwise."""
    from dpo_cache.training.output.run_folder import FREE_TO_CHANGE

    # patience counts evaluations
    return FREE_TO_CHANGE if grid.values("patience") == (None,) else FREE_TO_CHANGE - {"eval_every"}


def _key(grid: Grid, options: dict[str, Any]) -> str:
    """The options by which a run differs from the others of the grid."""
    return json.dumps([options[name] for name in grid.varied])
