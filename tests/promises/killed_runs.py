"""Training runs in forked processes, which kill themselves at one of their file operations.

A process that has imported everything forks one run for each job that it is given, or a sweep, whose runs are in
its own process, if an option is a list:

    {"cache": ..., "output": ..., "options": {..., "losses": [...]}, "resume": bool, "die_at": null, "result": FILE}

The answer is the run's exit code: 0 if it finished, 1 if it raised a `DpoCacheError`, -9 if it was killed.
FILE then has the error, the operations and the remarks. What takes long and has no part in files is left out:
the choice of the attention and the check of the gradient are made once, an evaluation gives the loss of the
list `losses` for its step, and an answer is a token that depends on the step.
"""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.programs import Server


class KilledRuns:
    """The forking process, seen from a test."""

    def __init__(self, cache: str, folder: Path):
        self.cache, self.folder, self.remarks = cache, folder, list[str]()
        self._server = Server(serve)

    def run(
        self, output: Path, options: dict[str, Any], *, resume: bool = False, die_at: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The exit code, and a finished run's `operations` and `remarks`, or the `error`."""
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        output.parent.mkdir(exist_ok=True)  # else its making adds an operation
        job = {
            "cache": self.cache,
            "output": str(output),
            "options": options,
            "resume": resume,
            "die_at": die_at,
            "result": str(result),
        }
        code = self._server.ask(job)
        return code, json.loads(result.read_text()) if result.exists() else {}

    def close(self) -> None:
        self._server.close()


# -- inside the forking process ----------------------------------------------------------------------------


def serve(pipe: Connection) -> None:
    import numpy as np

    from dpo_cache.lm.generation import Answer
    from dpo_cache.training import gradient_check, inputs
    from dpo_cache.training.output import samples
    from dpo_cache.training.step import TrainingStep

    gradient_check.GradientCheck.problem = lambda *_: ""  # type: ignore[method-assign]
    first: list[Any] = []
    real = inputs.choose_attention

    def choose(*arguments: Any, **options: Any) -> Any:
        if not first:
            first.append(real(*arguments, **options))
        return first[0]

    inputs.choose_attention = choose  # type: ignore[assignment]
    samples.write_answers = lambda *_, seed, **__: [Answer(np.array([65 + seed[1]], np.uint32), True)]  # type: ignore[assignment]
    means = {"rewards/accuracies": 0.5, "rewards/margins": 0.0, "num_pairs": 4}
    TrainingStep.evaluate = lambda _, step: {"loss": job["options"]["losses"][step], **means}  # type: ignore[method-assign]
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        if not first:  # in this process, so that all others have it
            _train({**job, "output": f"{job['output']}-first", "resume": False}, log=lambda _: None)
        pid = os.fork()
        if not pid:
            _child(job)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _child(job: dict[str, Any]) -> None:
    from dpo_cache.errors import DpoCacheError
    from tests.promises.file_operations import Operations

    operations, remarks = Operations(Path(job["output"]), job["die_at"]), list[str]()
    code, result = 70, {}
    try:
        operations.install()
        _train(job, log=remarks.append)
        code = 0
    except DpoCacheError as error:
        code, result = 1, {"error": str(error)}
    finally:
        result |= {"operations": operations.done, "remarks": remarks}
        Path(job["result"]).write_text(json.dumps(result))
        os._exit(code)


def _train(job: dict[str, Any], log: Any) -> None:
    import dpo_cache
    from dpo_cache.sweeping import processes
    from tests.sweeping.conftest import InlineProcess

    options = {"pairs": "pairs", "resume": job["resume"], "log": log, **job["options"]}
    del options["losses"]
    if not any(isinstance(value, list) for value in options.values()):
        dpo_cache.train(job["cache"], job["output"], **options)
        return
    processes.start_process = lambda arguments, *rest: InlineProcess(arguments, *rest)  # type: ignore[assignment]
    report = dpo_cache.sweep(job["cache"], job["output"], **options)
    assert report.finished, report.rows
