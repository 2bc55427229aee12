"""What a file system refuses, as one clear error."""

from __future__ import annotations

import errno
from typing import Any

from dpo_cache.errors import MissingFileError, StorageError


def storage_error(verb: str, place: Any, error: OSError) -> StorageError:
    advice = {
        errno.ENOSPC: "The disk is full: free some space and run the same command again; what was published is kept.",
        errno.EDQUOT: "The quota is used up: free some space and run the same command again; what was published is kept.",
        errno.EROFS: "The file system is read-only: choose another --cache.",
        errno.EACCES: "Permission denied: choose another --cache or change its permissions.",
        errno.EPERM: "Permission denied: choose another --cache or change its permissions.",
        errno.ENOTDIR: "Something in this path is a file: choose another --cache.",
        errno.EEXIST: "Something in this path is a file: choose another --cache.",
    }
    hint = advice.get(error.errno or 0, "Check the path and run the same command again; what was published is kept.")
    kind = MissingFileError if verb == "read" and isinstance(error, FileNotFoundError) else StorageError
    return kind(f"cannot {verb} {place}: {error.strerror or error}.\n{hint}")
