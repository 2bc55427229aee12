"""Check that all visible files of a cache are whole, with code of its own that reads only the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.format.documents import open_sealed

FORMAT = {"format": "dpo-cache", "version": 1}


def faults(root: Path) -> list[str]:
    """What is wrong with the visible files of the cache at `root`; empty where each is whole."""
    visible = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    found = [f"{path.relative_to(root)}: not whole" for path in visible if not _is_whole(path)]
    for manifest in root.glob("pairs/*/*/manifest.json"):
        for part in json.loads(manifest.read_bytes())["parts"] if _is_whole(manifest) else ():
            if not manifest.with_name(part["file"]).exists():
                found.append(f"{manifest.relative_to(root)}: names {part['file']}, which is not there")
    return found


def scratch(root: Path) -> list[str]:
    """Dot-files anywhere in the cache."""
    return [str(path.relative_to(root)) for path in root.rglob(".*")]


def _is_whole(path: Path) -> bool:
    content = path.read_bytes()
    if path.suffix == ".parquet":
        return hashlib.sha256(content).hexdigest() == path.stem
    if path.name == "format.json":
        return content == (json.dumps(FORMAT, sort_keys=True, indent=2) + "\n").encode()
    try:
        open_sealed(content, str(path))
    except CorruptShardError:
        return False
    return True
