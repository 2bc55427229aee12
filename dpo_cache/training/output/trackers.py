"""TensorBoard, Weights & Biases, Trackio and MLflow, through accelerate's trackers.

Each line of metrics.jsonl is sent as it is written. `RUN/trackers.json` keeps which run of which tracker that
is, so that a resumed training goes on in it:

    {"wandb": {"id": "3f0c…"}, "mlflow": {"id": "…"}, "trackio": {"id": "…"}, "tensorboard": {"id":
    "RUN/tensorboard"}}

A tracker that cannot be opened stops the run before anything is trained. One that fails later never does: its
lines wait, and are sent when it works again. `docs/tracking.md` says what each tracker can and cannot do
after a resumption.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from dpo_cache.errors import TrainingError, first_line
from dpo_cache.log import Log
from dpo_cache.losses.metrics import Metrics
from dpo_cache.training.output.tracker_names import tracked_names

FILE, FOLDER = "trackers.json", "tensorboard"
PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow-skinny",
}  # tracker -> what pip calls it
PROJECT = "dpo-cache"
PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
}
FOLDER_VARIABLE = "TENSORBOARD_LOGGING_DIR"
FIRST_PAUSE_S = (
    60.0  # before a tracker that failed is tried again; doubled each time, for a try may itself take minutes
)
STOPPED_EXIT_CODE = 130
LONE_PROCESS = {
    "LOCAL_RANK": -1,
    "WORLD_SIZE": 1,
    "PMI_SIZE": 1,
    "OMPI_COMM_WORLD_SIZE": 1,
    "MV2_COMM_WORLD_SIZE": 1,
}  # what launchers set


def check_trackers(names: Sequence[str]) -> None:
    """Raise `TrainingError` naming the pip command where a tracker that is asked for is not installed."""
    needed = {"accelerate": "accelerate", **{name: PACKAGES[name] for name in names}} if names else {}
    missing = [pip_name for module, pip_name in needed.items() if not _is_installed(module)]
    if missing:
        raise TrainingError(
            f"--log-to {' --log-to '.join(names)} needs {', '.join(missing)}.\n"
            f"Run `pip install {' '.join(missing)}`."
        )


def open_trackers(
    names: Sequence[str],
    output: Path,
    config: dict[str, Any],
    *,
    log_names: str,
    history: Sequence[Metrics],
    is_resumed: bool,
    log: Log,
) -> Trackers:
    """The trackers, opened, each with the run's config and the `history` that it lacks. Raises
    `TrainingError`.

    `history` is what metrics.jsonl holds: nothing for a new run, of a resumed one the lines up to its
    checkpoint.
    """
    known = _read_ids(output) if is_resumed else {}
    opened: list[_Tracker] = []
    trackers = Trackers(opened, log_names)
    try:
        for name in names:
            opened.append(_open(name, output, config, known.get(name), history, log))
        if names:
            _write_ids(output, {**known, **{tracker.name: {"id": tracker.id} for tracker in opened}})
        trackers.replay(history)
    except BaseException:
        trackers.close("failed")
        raise
    return trackers


class Trackers:
    """The trackers of a run, which are closed with it: `with open_trackers(...) as trackers`."""

    def __init__(self, trackers: Sequence[_Tracker], log_names: str):
        # what is told to them in the end, where no exception ends the run: finished or stopped
        self.state = "finished"
        self._trackers, self._log_names = trackers, log_names
        self._epoch, self._num_examples = 0.0, 0

    def log(self, line: Metrics) -> None:
        """Send a line of metrics.jsonl, whatever becomes of it."""
        self._count(line)
        for tracker in self._trackers:
            tracker.send(line, self._named(line, tracker))

    def replay(self, history: Sequence[Metrics]) -> None:
        """Count what was logged before, and send it to the trackers that are new."""
        for line in history:
            self._count(line)
            for tracker in self._trackers:
                if tracker.is_new:
                    tracker.send(line, self._named(line, tracker))

    def close(self, state: str) -> None:
        """End the trackers' runs: `finished`, `stopped` (to be resumed) or `failed`."""
        for tracker in self._trackers:
            tracker.close(state)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(
            self.state if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        )

    def _count(self, line: Metrics) -> None:
        if "loss" in line:
            self._epoch, self._num_examples = line["epoch"], self._num_examples + int(line["num_pairs"])

    def _named(self, line: Metrics, tracker: _Tracker) -> Metrics:
        return tracked_names(
            line, self._log_names, tracker.name, epoch=self._epoch, num_examples=self._num_examples
        )


class _Tracker:
    """One of accelerate's trackers, which may fail; `last_step` is what its run holds already and takes no
    second time.
    """

    def __init__(self, name: str, tracker: Any, id: str, last_step: int, *, is_new: bool, log: Log):
        self.name, self.id, self.is_new = name, id, is_new
        self._tracker, self._last_step, self._log = tracker, last_step, log
        self._waiting: list[tuple[int, Metrics]] = []
        self._pause_s, self._next_try = FIRST_PAUSE_S, 0.0
        self._has_failed = False

    def send(self, line: Metrics, named: Metrics) -> None:
        step = int(line["step"])
        if step > self._last_step:
            self._waiting.append((step, named))
            if time.monotonic() >= self._next_try:
                self._send_waiting()

    def close(self, state: str) -> None:
        self._send_waiting()
        lost = len(self._waiting)
        try:
            with _quiet_process():
                _finish(self.name, self._tracker, state)
        except Exception as error:  # whatever a tracker raises, the run's result stands
            self._log(f"--log-to {self.name}: not closed properly ({first_line(error)}).")
        if lost:
            self._log(f"--log-to {self.name}: {lost} lines could not be sent; metrics.jsonl has them.")

    def _send_waiting(self) -> None:
        try:
            while self._waiting:
                step, named = self._waiting[0]
                with _quiet_process():
                    self._tracker.log(named, step=step)
                del self._waiting[0]
            self._pause_s = FIRST_PAUSE_S
        except Exception as error:  # whatever a tracker raises, the training goes on
            self._next_try, self._pause_s = time.monotonic() + self._pause_s, 2 * self._pause_s
            if not self._has_failed:
                self._has_failed = True
                self._log(
                    f"--log-to {self.name}: {first_line(error)}. The training goes on, metrics.jsonl has "
                    "every line, and what waits is sent "
                    "when the tracker works again. This is said once."
                )


# -- what differs between them
# -------------------------------------------------------------------------------------------------


def _open(
    name: str,
    output: Path,
    config: dict[str, Any],
    known: dict[str, str] | None,
    history: Sequence[Metrics],
    log: Log,
) -> _Tracker:
    make = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}[name]
    next_step = int(history[-1]["step"]) + 1 if history else 0
    try:
        with _quiet_process():
            tracker, id, last_step, is_new = make(output.resolve(), known["id"] if known else None, next_step)
            if is_new:
                tracker.store_init_configuration(flat_config(config))
    except Exception as error:  # of whatever kind the tracker's package raises
        raise TrainingError(
            f"--log-to {name} cannot be opened: {first_line(error)}\nMend that, or leave it out."
        ) from error
    if known and is_new:
        log(
            f"--log-to {name}: its run of before is not there any more; a new one begins, with all that "
            "metrics.jsonl holds."
        )
    return _Tracker(name, tracker, id, last_step, is_new=is_new, log=log)


def _tensorboard(output: Path, known: str | None, next_step: int) -> tuple[Any, str, int, bool]:
    """Event files in the run's folder. What was written past the checkpoint is purged by TensorBoard when it
    reads them.
    """
    from accelerate.tracking import TensorBoardTracker

    variable = os.environ.get(FOLDER_VARIABLE)
    folder = Path(variable).expanduser() / output.name if variable else output / FOLDER
    tracker = TensorBoardTracker(folder.name, folder.parent, purge_step=next_step if known else None)
    tracker.start()
    return tracker, str(folder), -1, known != str(folder)


def _wandb(output: Path, known: str | None, _: int) -> tuple[Any, str, int, bool]:
    from accelerate.tracking import WandBTracker

    id = known or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
    console = (
        {} if "WANDB_CONSOLE" in os.environ else {"settings": {"console": "off"}}
    )  # it would send what the terminal shows
    tracker = WandBTracker(_project("wandb"), name=output.name, id=id, resume="allow", **console)
    tracker.start()
    return tracker, id, tracker.run.starting_step - 1, known is None


def _trackio(output: Path, known: str | None, _: int) -> tuple[Any, str, int, bool]:
    """Trackio finds a run by its name, the last of that name: where that is another one by now, a new one
    begins.
    """
    from accelerate.tracking import TrackioTracker

    options = {"name": output.name, "embed": False}
    tracker = TrackioTracker(_project("trackio"), **options, resume="allow" if known else "never")
    tracker.start()
    if known and tracker.run.id != known:
        tracker = TrackioTracker(
            _project("trackio"), **options, resume="never"
        )  # which ends the one that was opened
        tracker.start()
    is_new = tracker.run.id != known
    return tracker, tracker.run.id, -1 if is_new else _last_step_of_trackio(tracker.run), is_new


def _last_step_of_trackio(run: Any) -> int:
    from trackio.sqlite_storage import SQLiteStorage

    last = (
        SQLiteStorage.get_max_step_for_run(run.project, run.name, run_id=run.id)
        if run._is_local
        else run._initial_last_step
    )
    return -1 if last is None else last


def _mlflow(output: Path, known: str | None, _: int) -> tuple[Any, str, int, bool]:
    import mlflow
    from accelerate.tracking import MLflowTracker

    known = known if known and _has_mlflow_run(known) else None
    tracker = MLflowTracker(_project("mlflow"), run_id=known, run_name=output.name)
    tracker.start()
    id, last_step = tracker.active_run.info.run_id, -1
    if known:  # a point that is logged twice stands there twice
        client = mlflow.MlflowClient()
        names = [
            name
            for name in client.get_run(id).data.metrics
            if name in ("loss", "loss/train", "eval_loss", "loss/eval")
        ]
        last_step = max(
            (point.step for name in names for point in client.get_metric_history(id, name)), default=-1
        )
    return tracker, id, last_step, known != id


def _has_mlflow_run(id: str) -> bool:
    import mlflow

    try:
        return mlflow.get_run(id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _finish(name: str, tracker: Any, state: str) -> None:
    """End the tracker's run in a state, where it has one."""
    if name == "wandb" and state != "finished":
        tracker.run.finish(exit_code=STOPPED_EXIT_CODE if state == "stopped" else 1)
    elif name == "mlflow":
        import mlflow

        mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[state])
    elif name == "trackio":
        import trackio

        # the run's own `finish` leaves it to be finished again, and said so on stdout, when Python ends
        trackio.finish()
    else:
        tracker.finish()


# -- beside them -----------------------------------------------------------------------------------------


def flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config as hyper-parameters: `{"resolved": {"device": "cpu"}}` as `{"resolved/device": "cpu"}`,
    lists with commas.
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


def _is_installed(module: str) -> bool:
    """Not so where a mere folder has the name, as the one that Weights & Biases writes to."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def _project(name: str) -> str:
    return os.environ.get(PROJECT_VARIABLES[name]) or PROJECT


@contextmanager
def _quiet_process() -> Iterator[None]:
    """What accelerate's trackers and their packages expect around them, and nothing of it afterwards.

    accelerate asks its process state who logs. Unless the caller has one, it is that of a lone process on a
    CPU: no process group is begun, no device chosen, and an `Accelerator` made later finds no trace of it.
    What the packages print is no result: it goes to stderr.
    """
    from accelerate.state import PartialState
    from accelerate.utils import patch_environment

    with redirect_stdout(sys.stderr):
        if PartialState._shared_state:
            yield
            return
        with patch_environment(**{name: value for name, value in LONE_PROCESS.items() if name in os.environ}):
            PartialState(cpu=True)
        try:
            yield
        finally:
            PartialState._reset_state()


def _read_ids(output: Path) -> dict[str, dict[str, str]]:
    """Which runs of trackers this run is. Raises `TrainingError`."""
    path = output / FILE
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        return {name: {"id": str(entry["id"])} for name, entry in known.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{path}: not readable ({first_line(error)}).\nRemove it: trackers then begin new runs."
        ) from error


def _write_ids(output: Path, ids: dict[str, dict[str, str]]) -> None:
    path, scratch = output / FILE, output / f".{FILE}.tmp"
    try:
        scratch.write_text(json.dumps(ids, indent=2) + "\n")
        scratch.replace(path)
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}.\nFree some space, then go on with --resume."
        ) from error
