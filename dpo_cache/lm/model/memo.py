"""A memo of files' hashes from earlier runs, so that a large checkpoint is hashed once.

    ~/.cache/dpo-cache/digests/<name>.json
        {"version": 2, "stamp": [...], "content": {...}, "sha256": <hex>}

See `files/user_cache.py` for the folder. `sha256` is that of the file's own canonical JSON without this
entry. A memo that is missing, damaged, of another version or of another stamp counts as none: its content is
computed again. It never decides more than time.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_cache.files.atomic import write_whole
from dpo_cache.files.user_cache import user_cache

VERSION = 2


def read_memo(name: str, stamp: list[Any]) -> dict[str, Any]:
    """The content that was written under this name and stamp, or an empty one."""
    path = _path(name)
    if path is None:
        return {}
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(document, dict) or document.pop("sha256", None) != _digest(document):
        return {}
    content = document.get("content")
    is_known = document.get("version") == VERSION and document.get("stamp") == stamp
    return content if is_known and isinstance(content, dict) else {}


def write_memo(name: str, stamp: list[Any], content: dict[str, Any]) -> None:
    """Keep the content for later runs; a home that cannot be written costs them time, nothing else."""
    path = _path(name)
    if path is None:
        return
    document = {"version": VERSION, "stamp": stamp, "content": content}
    document["sha256"] = _digest(document)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document), is_shared=True)


def _path(name: str) -> Path | None:
    """The memo's file; None for a user without a home."""
    folder = user_cache()
    if folder is None:
        return None
    hashed = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
    return folder / "digests" / f"{hashed}.json"


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
