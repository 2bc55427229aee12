"""TensorBoard, Weights & Biases, Trackio and MLflow, through accelerate's trackers.

Each line of metrics.jsonl is sent after it is written. `RUN/trackers.json` has the id of the run in each
tracker, so that a resumed training continues it:

    {"wandb": {"id": "3f0c…"}, "mlflow": {"id": "…"}, "trackio": {"id": "…"},
     "tensorboard": {"id": "RUN/tensorboard"}}

A tracker that cannot be opened stops the run before anything is trained. A tracker that fails later is
dropped for the rest of the run; metrics.jsonl is complete in any case. `docs/tracking.md` describes what each
tracker does with the lines of a resumed run.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import tracking
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.files.atomic import refused_writes, write_whole
from dpo_cache.log import Log
from dpo_cache.losses.metrics import Metrics
from dpo_cache.training.output.tracker_access import FOLDER_VARIABLE, cannot_open, project_of
from dpo_cache.training.output.tracker_names import tracked_names

FILE, FOLDER = "trackers.json", "tensorboard"
WANDB_EXIT_CODES = {"finished": 0, "stopped": 130, "failed": 1}
MLFLOW_STATES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@contextmanager
def open_trackers(
    names: Sequence[str],
    output: Path,
    config: dict[str, Any],
    *,
    log_names: str,
    history: Sequence[Metrics],
    is_resumed: bool,
    log: Log,
) -> Iterator[Trackers]:
    """The trackers, open until the block ends; those of a new run have its config. Raises `TrainingError`.

    `history` has the lines of metrics.jsonl; for a resumed run, those up to its checkpoint.
    """
    known = _read_ids(output) if is_resumed else {}
    trackers = Trackers(log_names, history, log)
    try:
        ids = {name: {"id": trackers.open(name, output, config, known.get(name))} for name in names}
        if names:
            _write_ids(output, {**known, **ids})
        yield trackers
    except BaseException as error:
        trackers.close("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    trackers.close(trackers.state)


class Trackers:
    """The trackers of a run."""

    def __init__(self, log_names: str, history: Sequence[Metrics], log: Log):
        self.state = "finished"  # or "stopped": recorded by the trackers unless an exception ends the run
        self._log_names, self._log = log_names, log
        self._opened: dict[str, Any] = {}
        self._failed: set[str] = set()
        self._made_state = False
        self._next_step = int(history[-1]["step"]) + 1 if history else 0
        self._epoch, self._num_examples = 0.0, 0
        for line in history:
            self._count(line)

    def open(self, name: str, output: Path, config: dict[str, Any], known: dict[str, str] | None) -> str:
        """Open a tracker, in its earlier run if that is `known`. Returns the run's id. Raises
        `TrainingError`.
        """
        self._make_process_state()
        known_id = known["id"] if known else None
        try:
            with self._without_prints():
                tracker, id = OPENERS[name](output.resolve(), known_id, self._next_step)
                self._opened[name] = tracker
                if id != known_id:
                    tracker.store_init_configuration(flat_config(config))
        except Exception as error:  # each tracker's package has its own errors
            raise cannot_open(name, error) from error
        if known and id != known_id:
            self._log(f"`log_to` {name}: its previous run no longer exists; started a new one.")
        return id

    def log(self, line: Metrics) -> None:
        """Send a line of metrics.jsonl. A tracker that fails gets no more lines."""
        self._count(line)
        for name, tracker in self._opened.items():
            if name in self._failed:
                continue
            values = tracked_names(
                line, self._log_names, name, epoch=self._epoch, num_examples=self._num_examples
            )
            try:
                with self._without_prints():
                    tracker.log(values, step=int(line["step"]))
            except Exception as error:  # whatever a tracker raises, the training continues
                self._failed.add(name)
                self._log(
                    f"`log_to` {name} failed: {first_line(error)}. It gets no more lines of this run; "
                    "metrics.jsonl has all of them."
                )

    def close(self, state: str) -> None:
        """End the trackers' runs: `finished`, `stopped` (to be resumed) or `failed`."""
        for name, tracker in self._opened.items():
            try:
                with self._without_prints():
                    _finish(name, tracker, state)
            except Exception as error:  # the run's result does not depend on it
                if name not in self._failed:
                    self._log(f"`log_to` {name}: not closed properly ({first_line(error)}).")
        if self._made_state:
            PartialState._reset_state()

    @contextmanager
    def _without_prints(self) -> Iterator[None]:
        """While open, nothing is printed: some trackers print how to open their dashboards. Their warnings
        are logged.
        """
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                yield
        finally:
            for line in printed.getvalue().splitlines():
                if "warning" in line.lower():
                    self._log(line.strip("* "))

    def _count(self, line: Metrics) -> None:
        if "loss" in line:
            self._epoch, self._num_examples = line["epoch"], self._num_examples + int(line["num_pairs"])

    def _make_process_state(self) -> None:
        """Make accelerate's process state, which its trackers need, unless the caller has made one. It is
        removed when they are closed.
        """
        if not PartialState._shared_state:
            _OneProcess(cpu=True)
            self._made_state = True


class _OneProcess(PartialState):
    """The state of a process that starts no process group, whatever variables a launcher has set."""

    def _prepare_backend(self, *_: Any, **__: Any) -> tuple[None, DistributedType]:  # type: ignore[override]
        return None, DistributedType.NO


# -- differences between trackers --------------------------------------------------------------------------


def _tensorboard(output: Path, known: str | None, next_step: int) -> tuple[Any, str]:
    """Event files in the run's folder. TensorBoard drops those events of an earlier file that came after the
    checkpoint.
    """
    variable = os.environ.get(FOLDER_VARIABLE)
    folder = Path(variable).expanduser() / output.name if variable else output / FOLDER
    tracker = tracking.TensorBoardTracker(folder.name, folder.parent, purge_step=next_step if known else None)
    tracker.start()
    return tracker, str(folder)


def _wandb(output: Path, known: str | None, _: int) -> tuple[Any, str]:
    console = {} if "WANDB_CONSOLE" in os.environ else {"settings": {"console": "off"}}  # else uploaded
    tracker = tracking.WandBTracker(
        project_of("wandb"), name=output.name, id=known, resume="allow", **console
    )
    tracker.start()
    return tracker, tracker.run.id


def _trackio(output: Path, known: str | None, _: int) -> tuple[Any, str]:
    """A run of Trackio, which resumes the last run of a name; if that is another run, a new one starts."""
    for resume in ["allow", "never"] if known else ["never"]:
        tracker = tracking.TrackioTracker(project_of("trackio"), name=output.name, embed=False, resume=resume)
        tracker.start()  # ends a run that was opened before
        if tracker.run.id == known:
            break
    return tracker, tracker.run.id


def _mlflow(output: Path, known: str | None, _: int) -> tuple[Any, str]:
    run_id = known if known and _has_mlflow_run(known) else None
    tracker = tracking.MLflowTracker(project_of("mlflow"), run_id=run_id, run_name=output.name)
    tracker.start()
    return tracker, tracker.active_run.info.run_id


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}


def _has_mlflow_run(id: str) -> bool:
    import mlflow

    try:
        return mlflow.get_run(id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _finish(name: str, tracker: Any, state: str) -> None:
    """End the tracker's run in a state, if the tracker has states."""
    if name == "wandb":
        tracker.run.finish(exit_code=WANDB_EXIT_CODES[state])
    elif name == "mlflow":
        import mlflow

        mlflow.end_run(MLFLOW_STATES[state])
    elif name == "trackio":
        import trackio

        trackio.finish()  # after the run's own `finish`, Trackio ends it again when Python ends
    else:
        tracker.finish()


# -- helpers ---------------------------------------------------------------------------------------------


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config as flat hyper-parameters: `{"resolved": {"device": "cpu"}}` becomes `{"resolved/device":
    "cpu"}`, lists with commas.
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update({f"{name}/{inner}": entry for inner, entry in flat_config(value).items()})
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(map(str, value))
        else:
            flat[name] = value if value is None or isinstance(value, bool | int | float | str) else str(value)
    return flat


def _read_ids(output: Path) -> dict[str, dict[str, str]]:
    """The ids of the run in its trackers. Raises `TrainingError`."""
    path = output / FILE
    try:
        known = json.loads(path.read_bytes()) if path.exists() else {}
        return {name: {"id": str(entry["id"])} for name, entry in known.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{path}: not readable ({first_line(error)}).\nRemove it: trackers then begin new runs."
        ) from error


def _write_ids(output: Path, ids: dict[str, dict[str, str]]) -> None:
    path = output / FILE
    with refused_writes(path, TrainingError, "Then resume the run."):
        write_whole(path, json.dumps(ids, indent=2) + "\n")
