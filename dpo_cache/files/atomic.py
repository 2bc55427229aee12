"""Files and folders that are written whole or not at all: under a scratch name first, which is then renamed.

    with replaced(path) as scratch:
        scratch.write_text("...")  # or scratch.mkdir(), and files in it

A process that is killed leaves its scratch, a dot-file that no reader opens. The next writer of the same path
removes it, unless the path is shared: then each writer has a scratch of its own.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_cache.errors import DpoCacheError
from dpo_cache.files.sync import sync

REMEDIES = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some space: the quota is used up.",
    errno.EFBIG: "Raise the limit on the size of a file (`ulimit -f`).",
}


@contextmanager
def refused_writes(path: Path, kind: type[DpoCacheError], advice: str) -> Iterator[None]:
    """Raise an error of this kind where the file system refuses to write the path: what to do, then the
    advice.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"cannot write {path}: {error.strerror or error}.\n{remedy_of(error)} {advice}") from error


def is_refused_write(error: BaseException) -> bool:
    """Return whether the file system refused; safetensors and tokenizers have errors of their own, which name
    the number of the system's error in their text.
    """
    return isinstance(error, OSError) or "(os error " in str(error)


def remedy_of(error: BaseException) -> str:
    """Advice about a refused write, as a sentence."""
    for number, remedy in REMEDIES.items():
        if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
            return remedy
    return "Check the path and its permissions."


def write_whole(path: Path, content: str | bytes, *, is_shared: bool = False) -> None:
    """Replace a file by this content, text as UTF-8. Raises `OSError`; the file is then as it was."""
    with replaced(path, is_shared=is_shared) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replaced(path: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """A scratch path in the same folder, for the block to make a file or folder at.

    When the block ends, that is synced and renamed to `path`; if anything raises, it is removed and `path` is
    as it was. With `is_shared`, several processes may write the same path at once: the last one wins.
    """
    unique = f".{secrets.token_hex(4)}" if is_shared else ""
    scratch = path.with_name(f".{path.name}{unique}.tmp")
    remove(scratch)
    try:
        yield scratch
        for written in (*(scratch.rglob("*") if scratch.is_dir() else ()), scratch):
            sync(written)
        _rename(scratch, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # the first refusal is the one to report
            remove(scratch)


def is_scratch(name: str) -> bool:
    """Return whether a file or folder of this name may be what a killed writer left."""
    return name.startswith(".") and name.endswith(".tmp")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _rename(scratch: Path, path: Path) -> None:
    if not path.is_dir():
        os.replace(scratch, path)
        return
    former = scratch.with_suffix(".old.tmp")  # nothing can be renamed over a folder that is not empty
    remove(former)
    os.replace(path, former)
    try:
        os.replace(scratch, path)
    except BaseException:
        os.replace(former, path)
        raise
    remove(former)
