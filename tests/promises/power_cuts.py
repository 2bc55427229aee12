"""A disk that writes down its steps, and what a power cut after any of them may leave.

What was synced stays. Of the rest anything may be there or not: each name of a folder on its own may be what
it was at the last sync of the folder or what it became at any step since; a file's bytes since its last sync
may be lost, torn or zeros. A folder whose own name is lost is lost with all that is in it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_cache.store.folders.disk import Disk
from dpo_cache.store.folders.local import LocalFolder

Step = tuple[Any, ...]  # its name, and what it was done to
Tree = dict[str, bytes | None]  # what is left, by path below the base; None: a folder

MOST_STATES = 48  # after one step; where more are possible, the extremes and a sample of the rest


class Dead(BaseException):
    """The process was killed."""


class RecordingDisk(Disk):
    """Takes each step and notes it. Only syncs are noted: nobody pulls the plug of the tests' machine.

    `drops` says of a step and the one before whether it is left out, as in a program that forgot it.
    """

    def __init__(
        self,
        log: list[Step],
        drops: Callable[[Step, Step], bool] = lambda *_: False,
        last_step: int | None = None,
    ):
        self.log, self._drops, self._last_step, self._num_steps = log, drops, last_step, 0
        self._open: dict[int, Path] = {}
        self._before: Step = ("start",)

    def _note(self, *step: Any) -> None:
        self._num_steps += 1
        if self._last_step is not None and self._num_steps > self._last_step:
            raise Dead
        if not self._drops(step, self._before):
            self.log.append(step)
        self._before = step

    def make_folder(self, path: Path) -> None:
        if path.parent.is_dir() and not path.exists():
            self._note("make_folder", path)
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._note("create", path)
        descriptor = super().create(path)
        self._open[descriptor] = path
        return descriptor

    def write(self, descriptor: int, content: bytes) -> None:
        self._note("write", self._open[descriptor], content)
        super().write(descriptor, content)

    def sync_file(self, descriptor: int) -> None:
        self._note("sync_file", self._open[descriptor])

    def rename(self, old: Path, new: Path) -> None:
        self._note("rename", old, new)
        super().rename(old, new)

    def sync_folder(self, path: Path) -> None:
        path.stat()
        self._note("sync_folder", path)

    def unlink(self, path: Path) -> None:
        if path.exists():
            self._note("unlink", path)
        super().unlink(path)

    def remove_folder(self, path: Path) -> None:
        if path.is_dir() and not any(path.iterdir()):
            self._note("remove_folder", path)
        super().remove_folder(path)


class RecordingFolder(LocalFolder):
    """Notes in the same log when a file was asked to be published or removed, and when that was done."""

    disk: RecordingDisk

    def publish(self, name: str, content: bytes) -> None:
        self.disk.log.append(("publishing", name, content))
        super().publish(name, content)
        self.disk.log.append(("published", name, content))

    def remove(self, name: str) -> None:
        self.disk.log.append(("removing", name))
        super().remove(name)
        self.disk.log.append(("removed", name))


@dataclass
class File:
    """`synced` bytes are there for sure, `content` is what the program believes."""

    synced: bytes = b""
    content: bytes = b""

    def possible(self) -> list[bytes]:
        if self.content == self.synced:
            return [self.content]
        torn = self.content[: (len(self.synced) + len(self.content)) // 2]
        return [self.synced, torn, bytes(len(self.content)), self.content]


@dataclass
class Folder:
    """What each name has been since the folder was last synced; None: nothing."""

    names: dict[str, list[File | Folder | None]] = field(default_factory=dict)


class Model:
    """The steps so far, as a disk remembers them."""

    def __init__(self, base: Path):
        self._base, self._top = base, Folder()
        self.allowed: dict[str, set[bytes | None]] = {}  # what may be seen of each published name

    def take(self, step: Step) -> None:
        kind, subject = step[0], step[1]
        if kind in ("publishing", "removing"):
            self.allowed.setdefault(subject, {None}).add(step[2] if kind == "publishing" else None)
        elif kind in ("published", "removed"):
            self.allowed[subject] = {step[2] if kind == "published" else None}
        elif kind == "write":
            self._file(subject).content += step[2]
        elif kind == "sync_file":
            self._file(subject).synced = self._file(subject).content
        elif kind == "sync_folder":
            self._sync_folder(subject)
        elif kind == "rename":
            self._enter(step[2], self._find(subject))
            self._enter(subject, None)
        else:
            self._enter(
                subject,
                {
                    "make_folder": Folder,
                    "create": File,
                    "unlink": lambda: None,
                    "remove_folder": lambda: None,
                }[kind](),
            )

    def states(self, chance: random.Random, most: int = MOST_STATES) -> Iterator[Tree]:
        """Trees that a power cut now may leave: all of them where there are few."""
        slots = list(self._slots(self._top))
        for choice in _choices([len(options) for _, options in slots], chance, most):
            chosen = {slot: options[index] for (slot, options), index in zip(slots, choice, strict=True)}
            yield dict(self._tree(self._top, "", chosen))

    def _slots(self, folder: Folder) -> Iterator[tuple[Any, list[Any]]]:
        """Everything that is not settled, oldest possibility first."""
        for name, history in folder.names.items():
            if len(history) > 1:
                yield (id(folder), name), history
            for entry in history:
                if isinstance(entry, Folder):
                    yield from self._slots(entry)
                elif entry is not None and len(entry.possible()) > 1:
                    yield id(entry), entry.possible()

    def _tree(
        self, folder: Folder, prefix: str, chosen: dict[Any, Any]
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, history in folder.names.items():
            entry = chosen.get((id(folder), name), history[-1])
            if isinstance(entry, Folder):
                yield prefix + name, None
                yield from self._tree(entry, f"{prefix}{name}/", chosen)
            elif entry is not None:
                yield prefix + name, chosen.get(id(entry), entry.content)

    def _find(self, path: Path) -> File | Folder:
        entry: File | Folder | None = self._top
        for part in path.relative_to(self._base).parts:
            assert isinstance(entry, Folder)
            entry = entry.names[part][-1]
        assert entry is not None
        return entry

    def _file(self, path: Path) -> File:
        file = self._find(path)
        assert isinstance(file, File)
        return file

    def _enter(self, path: Path, entry: File | Folder | None) -> None:
        folder = self._find(path.parent)
        assert isinstance(folder, Folder)
        folder.names.setdefault(path.name, [None]).append(entry)

    def _sync_folder(self, path: Path) -> None:
        if path.is_relative_to(self._base):
            folder = self._find(path)
            assert isinstance(folder, Folder)
            folder.names = {name: history[-1:] for name, history in folder.names.items()}


def _choices(sizes: list[int], chance: random.Random, most: int) -> Iterator[tuple[int, ...]]:
    if math.prod(sizes) <= most:
        yield from itertools.product(*map(range, sizes))
        return
    oldest, newest = tuple(0 for _ in sizes), tuple(size - 1 for size in sizes)
    yield oldest
    yield newest
    for place, size in enumerate(sizes):
        for option in range(size):
            yield (*newest[:place], option, *newest[place + 1 :])
            yield (*oldest[:place], option, *oldest[place + 1 :])
    for _ in range(most):
        yield tuple(chance.randrange(size) for size in sizes)
