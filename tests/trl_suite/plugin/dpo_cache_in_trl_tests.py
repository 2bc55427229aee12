"""A pytest plugin for TRL's tests: models and data from a folder, and `CachedDPOTrainer` as `trl.DPOTrainer`.

It is apart from the package `tests`, whose name TRL's tests have, too.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

OUTCOMES: dict[str, tuple[str, str]] = {}  # test -> outcome, and the last line of an error


def pytest_configure() -> None:
    os.chdir(os.environ["DPO_CACHE_TRL_FOLDER"])  # where `trl-internal-testing/NAME` are folders
    from trl import import_utils

    import_utils.__getattr__ = package_check
    if os.environ["DPO_CACHE_TRL_TRAINER"] == "ours":
        import trl

        trl.DPOTrainer = trainer_on_a_cache()


def package_check(name: str) -> Any:
    """In place of a check that the tests import and the installed TRL lacks: the package is not there."""
    if name.startswith("is_") and name.endswith("_available"):
        return lambda: False
    raise AttributeError(name)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.partition("::")[2]
    if report.when == "call" or report.outcome != "passed":
        last = report.longreprtext.strip().splitlines()[-1:] or [""]
        OUTCOMES[name] = (report.outcome, last[0])


def pytest_sessionfinish() -> None:
    Path(os.environ["DPO_CACHE_TRL_OUTCOMES"]).write_text(json.dumps(OUTCOMES))


def trainer_on_a_cache() -> type:
    """`CachedDPOTrainer` with a new cache, which is filled before it is read: with the rows of streams, too."""
    from datasets import Dataset, IterableDataset

    from dpo_cache.integrations.trl import CachedDPOTrainer

    class FilledTrainer(CachedDPOTrainer):
        def __init__(self, model: Any, *positional: Any, **given: Any):
            cache = tempfile.mkdtemp(prefix="cache-")
            super().__init__(model, *positional, cache=cache, score_missing=True, **given)

        def _with_logps(self, dataset: Any, name: str) -> Any:
            if not isinstance(dataset, IterableDataset):
                return super()._with_logps(dataset, name)
            self._score_missing(Dataset.from_list(list(dataset)), name)
            self._scores_missing = False
            try:
                return super()._with_logps(dataset, name)
            finally:
                self._scores_missing = True

    return FilledTrainer
