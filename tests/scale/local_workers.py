"""Workers of processes on this machine that go wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cache.lm import runner
from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers.job import Receipt
from dpo_cache.precomputing.workers.worker import Worker
from tests.scale.ray_workers import NOTES


class WrongLater(Worker):
    """Gives wrong log-probs once two workers have published."""

    def score(self, number: int, unit: Unit) -> Receipt:
        folder = Path(os.environ[NOTES])
        if len([*folder.glob("published-*")]) == 2:
            _give_wrong_values()
        receipt = super().score(number, unit)
        Path(folder, f"published-{os.getpid()}").touch()
        return receipt


def _give_wrong_values() -> None:
    real = runner.score_completions

    def wrong(*arguments: Any) -> Iterator[Any]:
        for step in real(*arguments):
            for _, score in step.scores:
                score.token_logps[-1] -= 0.5
            yield step

    runner.score_completions = wrong
