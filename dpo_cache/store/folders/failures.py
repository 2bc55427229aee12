"""A file system's refusals as one clear error each."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_cache.errors import MissingFileError, StorageError

_AGAIN = "run the same command again; what was published is kept."
_CHOOSE = "choose another `cache` or change its permissions."
_MOUNT = f"Its disk went away: mount it again and {_AGAIN}"

ADVICE = {
    errno.ENOSPC: f"The disk is full: free some space and {_AGAIN}",
    errno.EDQUOT: f"The quota is used up: free some space and {_AGAIN}",
    errno.EFBIG: f"A file may not be this large here: raise the limit (`ulimit -f`) and {_AGAIN}",
    errno.EROFS: "The file system is read-only: choose another `cache`.",
    errno.EACCES: f"Permission denied: {_CHOOSE}",
    errno.EPERM: f"Permission denied: {_CHOOSE}",
    errno.ENOTDIR: "Something in this path is a file: choose another `cache`.",
    errno.EEXIST: "Something in this path is a file: choose another `cache`.",
    errno.ENAMETOOLONG: "The file system has no room for a path this long: choose a shorter `cache` or "
    "`name`.",
    errno.ENOENT: f"It is gone, or its disk was unmounted: check the path and {_AGAIN}",
    errno.ESTALE: _MOUNT,
    errno.ENOTCONN: _MOUNT,
    errno.ENODEV: _MOUNT,
    errno.ETIMEDOUT: _MOUNT,
    errno.EIO: f"The disk failed, not the cache: look at the system's log, then {_AGAIN}",
    errno.EMFILE: "Too many files are open: raise the limit (`ulimit -n`; in Python `resource.setrlimit`) "
    f"and {_AGAIN}",
    errno.ENFILE: f"Too many files are open on this machine: close some and {_AGAIN}",
}
TOO_MANY_OPEN = {errno.EMFILE, errno.ENFILE}


def storage_error(verb: str, place: Any, error: OSError) -> StorageError:
    """The error to raise in place of the file system's, with its advice; `MissingFileError` for a file to
    read that is gone.
    """
    advice = ADVICE.get(error.errno or 0, f"Check the path and {_AGAIN}")
    kind = MissingFileError if verb == "read" and isinstance(error, FileNotFoundError) else StorageError
    return kind(f"cannot {verb} {place}: {error.strerror or error}.\n{advice}")


@contextmanager
def storage_errors(verb: str, place: Any) -> Iterator[None]:
    """Raise `StorageError` for what the file system refuses in the block."""
    try:
        yield
    except OSError as error:
        raise storage_error(verb, place, error) from error
