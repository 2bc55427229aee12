"""A disk that refuses one of its steps, or every one from then on; and one that is unmounted in the
middle.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cache.store.folders.disk import Disk

STEPS = (
    "make_folder",
    "create",
    "write",
    "sync_file",
    "close",
    "rename",
    "sync_folder",
    "unlink",
    "remove_folder",
)
LOOKS = ("status", "names", "entries", "read", "open")


class TroubledDisk(Disk):
    """Calls `trouble(number, step, arguments)` before each step, counted from 1. Syncs are not carried out,
    to be fast.

    A write that is refused has written half; a close that is refused has closed.
    """

    def __init__(self, trouble: Callable[[int, str, tuple], None]):
        self._trouble, self.num_steps = trouble, 0

    def meet(self, step: str, *arguments: Any) -> None:
        self.num_steps += 1
        self._trouble(self.num_steps, step, arguments)

    def open(self, path: Path) -> Any:
        self.meet("open", path)
        return TroubledFile(path, self)


class TroubledFile(io.FileIO):
    """Each read is a step, too."""

    def __init__(self, path: Path, disk: TroubledDisk):
        super().__init__(path)
        self._disk = disk

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        self._disk.meet("read on", self.name)
        return super().read(-1 if size is None else size) or b""

    def __del__(self) -> None:
        self.close()  # pyarrow leaves that to whoever opened it


def _troubled(step: str) -> Callable[..., Any]:
    def take(self: TroubledDisk, *arguments: Any) -> Any:
        try:
            self.meet(step, *arguments)
        except OSError:
            if step == "write":
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            if step == "close":
                os.close(arguments[0])
            raise
        if step == "sync_folder":
            return arguments[0].stat()
        return None if step == "sync_file" else getattr(Disk, step)(self, *arguments)

    return take


for _step in (*STEPS, *(look for look in LOOKS if look != "open")):
    setattr(TroubledDisk, _step, _troubled(_step))


class Refusal:
    """Refuses the step of this number with this errno; with `forever`, all that come after it, too."""

    def __init__(self, at: int, errno: int, *, forever: bool = False):
        self._at, self._errno, self._forever = at, errno, forever
        self.refused: list[tuple[str, tuple]] = []

    def __call__(self, number: int, step: str, arguments: tuple) -> None:
        if number == self._at or (self._forever and number > self._at):
            self.refused.append((step, arguments))
            raise OSError(self._errno, os.strerror(self._errno))


class Unmounting:
    """Before the step of this number the folder goes elsewhere, and an empty one is left in its place."""

    def __init__(self, at: int, root: Path, elsewhere: Path):
        self._at, self._root, self._elsewhere = at, root, elsewhere

    def __call__(self, number: int, step: str, arguments: tuple) -> None:
        if number == self._at:
            self._root.rename(self._elsewhere)
            self._root.mkdir()
