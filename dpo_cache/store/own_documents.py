"""The references and pair sets that this user has published, wherever their caches are now.

    ~/.cache/dpo-cache/published/<sha256>    an empty file for each reference.json and manifest.json

The name is the document's seal, so it covers every byte: a copy of the user's own cache is recognised at any
place, and a document that somebody else wrote or changed is not, whoever owns its file. Without the record a
document counts as somebody else's; `train` then asks for `model` where it would start from a place that may
hold anything (see `starting_model.py`).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from dpo_cache.files.user_cache import user_cache
from dpo_cache.store.format.documents import Document, digest_json


def note_own(document: Document) -> None:
    """Record that this user published the document; a home that cannot be written keeps no record."""
    path = _record_of(document)
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def is_own(document: Document) -> bool:
    """Return whether this user published the present version of the document."""
    path = _record_of(document)
    return path is not None and path.is_file()


def _record_of(document: Document) -> Path | None:
    folder = user_cache()
    unsealed = {name: member for name, member in document.items() if name != "sha256"}
    return folder / "published" / digest_json(unsealed) if folder else None
