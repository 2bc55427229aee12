"""Workers that go wrong in Ray's processes, and where they note what they did."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NoReturn

from dpo_cache.precomputing.units import Unit
from dpo_cache.precomputing.workers.job import Job, Receipt, rows_of
from dpo_cache.precomputing.workers.worker import Worker
from tests.conftest import make_llama

NOTES = "DPO_CACHE_TEST_NOTES"  # names the folder; Ray's processes have the environment of its start
DEADLY_ROW = 7


def note(text: str) -> None:
    with open(Path(os.environ[NOTES], "notes"), "a") as file:
        file.write(f"{text}\n")


def notes() -> list[str]:
    """What was noted, once."""
    file = Path(os.environ[NOTES], "notes")
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class KilledTwice(Worker):
    """Is killed before it scores unit 0, and after it has published unit 1, each the first time."""

    def score(self, number: int, unit: Unit) -> Receipt:
        is_first = not Path(os.environ[NOTES], f"begun-{number}").exists()
        Path(os.environ[NOTES], f"begun-{number}").touch()
        if is_first and number == 0:
            note("killed before publishing")
            die()
        receipt = super().score(number, unit)
        if is_first and number == 1:
            note(f"killed after publishing {receipt.num_completions}")
            die()
        return receipt


class KilledByARow(Worker):
    """Is killed by one row, always."""

    def score(self, number: int, unit: Unit) -> Receipt:
        if DEADLY_ROW in rows_of(unit):
            note("killed")
            die()
        return super().score(number, unit)


class WithoutWeights(Worker):
    """Finds no weights where the driver found them."""

    def __init__(self, job: Job):
        Path(job.options.model, "model.safetensors").unlink()
        super().__init__(job)


class OtherCheckpoint(Worker):
    """Finds another checkpoint under the same path."""

    def __init__(self, job: Job):
        make_llama(seed=1).save_pretrained(job.options.model)
        super().__init__(job)
