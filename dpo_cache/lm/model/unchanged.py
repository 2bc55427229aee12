"""One model for a whole run: a Hub model is read at one commit, and files that change meanwhile are noticed.

    with one_checkpoint():
        config, identity = ...  # the files are hashed
        model = load_model(...)  # raises `ModelError` if one of them is another file by now

Outside of such a block, nothing is remembered from one call to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from dpo_cache.errors import ModelError

Stamp = list[Any]  # path, size, times and inode
Attributes = tuple[int, ...]  # number of links, mode and owners


@dataclass
class _Run:
    commits: dict[tuple[str, str | None], str | None] = field(default_factory=dict)
    files: dict[Path, tuple[Stamp, Attributes] | None] = field(default_factory=dict)  # by the path as opened


_run: ContextVar[_Run | None] = ContextVar("checkpoint_of_the_run", default=None)


@contextmanager
def one_checkpoint() -> Iterator[None]:
    """In this block, `commit_of` answers the same for each call, and `check_unchanged` compares stamps.

    A block in another block belongs to it.
    """
    token = _run.set(_run.get() or _Run())
    try:
        yield
    finally:
        _run.reset(token)


def commit_of(location: str, revision: str | None) -> str | None:
    """The commit that a revision of a Hub model names now; the revision itself of a folder, or if unknown."""
    if os.path.isdir(location):
        return revision
    run = _run.get()
    commits = {} if run is None else run.commits
    if (location, revision) not in commits:
        commits[location, revision] = _resolve(location, revision)
    return commits[location, revision]


def stamp(path: Path) -> Stamp:
    """The properties that change when a file is rewritten: real path, size, times and inode. Noted for the
    run.
    """
    found = _status(path)
    if (run := _run.get()) is not None:
        run.files.setdefault(path, found)
    if found is None:
        raise ModelError(f"{path}: the file is gone.\nDownload or save the model again.")
    return found[0]


def note_files(paths: list[Path]) -> None:
    """Note the stamps of files, also of those that do not exist."""
    if (run := _run.get()) is not None:
        for path in paths:
            run.files.setdefault(path, _status(path))


def check_unchanged() -> None:
    """Raise `ModelError` if a noted file was changed, replaced or removed since it was first read."""
    run = _run.get()
    changed = [path for path, noted in run.files.items() if not _is_same(_status(path), noted)] if run else []
    if changed:
        raise ModelError(
            f"{changed[0]} was changed while the model was read: its identity and its weights may be of two "
            "different models. It was not used.\n"
            "Wait until nothing writes into that folder, or copy it, and run again."
        )


def check_not_rewritten() -> None:
    """Raise `ModelError` if the content of a noted file was overwritten.

    A model on a CPU may read its weights from the file itself as long as it runs. A file that replaces
    another one does no harm.
    """
    run = _run.get()
    for path, noted in run.files.items() if run else ():
        found = _status(path)
        if noted and found and found[0][-1] == noted[0][-1] and found[0][:3] != noted[0][:3]:
            raise ModelError(
                f"{path} was overwritten while the model ran, and its weights with it. The scores since the "
                "last ones that were stored are discarded.\n"
                "Save into another folder, or copy this one, and run again."
            )


def _is_same(found: tuple[Stamp, Attributes] | None, noted: tuple[Stamp, Attributes] | None) -> bool:
    """Return whether a file's content is the noted one. A hard link, another mode or another owner sets the
    time of the last change (ctime), too; the content is then the same if size and time of writing are.
    """
    if found is None or noted is None:
        return found is noted
    if found[0] == noted[0]:
        return True
    (real, size, written, _changed, inode), old = found[0], noted[0]
    return [real, size, written, inode] == [*old[:3], old[4]] and found[1] != noted[1]


def _status(path: Path) -> tuple[Stamp, Attributes] | None:
    try:
        real = path.resolve()
        status = real.stat()
    except OSError:
        return None
    stamp = [str(real), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return stamp, (status.st_nlink, status.st_mode, status.st_uid, status.st_gid)


def _resolve(location: str, revision: str | None) -> str | None:
    for name in ("config.json", "adapter_config.json"):
        try:
            found = Path(hf_hub_download(location, name, revision=revision))
        except (OSError, ValueError):  # no such file, or the Hub cannot be reached: loading raises an error
            continue
        return found.parent.name  # .../snapshots/<commit>/config.json
    return revision
