"""Runs of a sweep in this process: in separate processes, importing torch would take most of the time."""

import contextlib
import io
import sys
from pathlib import Path
from typing import IO

import pytest

import dpo_cache
from dpo_cache.cli import app as app_module
from dpo_cache.sweeping import processes
from tests.conftest import chat_rows, write_rows


@pytest.fixture(scope="package")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("swept")
    dpo_cache.precompute(
        model_folder, write_rows(folder / "pairs.jsonl", chat_rows(15)), str(folder / "cache")
    )
    dpo_cache.precompute(
        model_folder, write_rows(folder / "heldout.jsonl", chat_rows(6, seed=9)), str(folder / "cache")
    )
    return str(folder / "cache")


class InlineProcess:
    """A process that has run to its end by the time it is there."""

    def __init__(
        self,
        arguments: list[str],
        out: IO[bytes],
        log: IO[bytes],
        environment: dict[str, str],
        lock: int | None,
    ):
        said, told, argv = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = ["dpo-cache", *arguments]
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(said):
                app_module.main()
        except SystemExit as leaving:
            self.code = int(leaving.code or 0)
        finally:
            sys.argv = argv
        out.write(told.getvalue().encode())
        log.write(said.getvalue().encode())
        out.flush(), log.flush()

    def poll(self) -> int:
        return self.code

    def send_signal(self, number: int) -> None:
        raise AssertionError("it has ended")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the runs that were started, in order, each run in this process."""
    names: list[str] = []

    def start(arguments: list[str], *rest: object) -> InlineProcess:
        names.append(
            next(
                Path(part.removeprefix("--output=")).name
                for part in arguments
                if part.startswith("--output=")
            )
        )
        return InlineProcess(arguments, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(processes, "start_process", start)
    monkeypatch.setattr("dpo_cache.sweeping.run.POLL_S", 0.0)
    return names
