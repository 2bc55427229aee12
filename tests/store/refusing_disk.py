"""A disk that refuses chosen files: tests run as root, whom no permission stops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.store.folders import local
from dpo_cache.store.folders.disk import Disk

READING = ("read", "open")
REMOVING = ("unlink", "rename")


class RefusingDisk(Disk):
    """Raises `OSError` with this errno from the steps of these names, for the files that `is_refused`
    accepts.
    """

    def __init__(self, number: int, is_refused: Callable[[Path], bool], steps: tuple[str, ...]):
        self._number, self._is_refused, self._steps = number, is_refused, steps

    def _meet(self, step: str, path: Path) -> None:
        if step in self._steps and self._is_refused(path):
            raise OSError(self._number, os.strerror(self._number))

    def read(self, path: Path) -> bytes:
        self._meet("read", path)
        return super().read(path)

    def open(self, path: Path) -> Any:
        self._meet("open", path)
        return super().open(path)

    def entries(self, path: Path) -> Iterator[os.DirEntry[str]]:
        self._meet("entries", path)
        return super().entries(path)

    def unlink(self, path: Path) -> None:
        self._meet("unlink", path)
        super().unlink(path)

    def rename(self, old: Path, new: Path) -> None:
        self._meet("rename", old)
        super().rename(old, new)


def refuse(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    is_refused: Callable[[Path], bool],
    steps: tuple[str, ...] = READING,
) -> None:
    """Every local folder that is opened from now on refuses these steps for these files."""
    monkeypatch.setattr(local, "Disk", partial(RefusingDisk, number, is_refused, steps))
