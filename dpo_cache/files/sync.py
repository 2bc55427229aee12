"""Waiting until files and folders are on the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:  # a folder cannot be opened there, and its renames are journaled
        return
    # Windows syncs only files that may be written
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in NO_FOLDER_SYNC:  # some network file systems sync only files
            raise
    finally:
        os.close(descriptor)
