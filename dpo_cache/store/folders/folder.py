"""Whole files in a cache folder, on a disk (`local.py`) or behind any fsspec URL (`remote.py`).

Every file is immutable and published in one step, so a reader sees all of it or nothing. Names are relative
to the folder, with `/` between their parts; dot-files are scratch and never listed.
"""

from __future__ import annotations

import os
from pathlib import Path

from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.folders.remote import RemoteFolder, open_remote

Folder = LocalFolder | RemoteFolder


def open_folder(location: str | os.PathLike[str]) -> Folder:
    """The folder at a path or fsspec URL. Nothing is created until something is published."""
    text = os.fspath(location).removeprefix("file://")
    return open_remote(text) if "://" in text else LocalFolder(Path(text).expanduser())
