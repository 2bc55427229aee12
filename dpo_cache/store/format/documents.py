"""JSON files of the cache: canonical, so a file has exactly one spelling, and sealed with their own digest.

A sealed document is a JSON object whose member `sha256` is the hex sha256 of the object without it,
written with sorted keys, no spaces and raw UTF-8. On disk it is indented by two spaces with sorted keys
and ends in a newline; any other spelling is refused, so every flipped byte is found.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from dpo_cache.errors import CorruptShardError
from dpo_cache.store.folders.folder import Folder

Document = dict[str, Any]

DOCUMENT_BYTES = 16 * 2**20  # at most: the manifest of some nine hundred million pairs
REMEDY = "The file was changed or damaged. Delete it and run the `dpo-cache precompute` that made it again."


def canonical_json(value: Any) -> bytes:
    """The one spelling that is hashed: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_bytes(content: bytes) -> str:
    """Hex sha256."""
    return hashlib.sha256(content).hexdigest()


def digest_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON."""
    return digest_bytes(canonical_json(value))


def render_document(document: Document) -> bytes:
    """The one spelling on disk of an unsealed document."""
    return (
        json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def seal_document(document: Document) -> bytes:
    """The bytes to publish: the document with its own digest."""
    return render_document({**document, "sha256": digest_json(document)})


def read_sealed(folder: Folder, name: str) -> Document:
    """A sealed file of the cache; see `open_sealed`."""
    return open_sealed(read_bounded(folder, name), f"{folder}/{name}")


def read_bounded(folder: Folder, name: str) -> bytes:
    """The bytes of a JSON file; `CorruptShardError` for one larger than any of the cache."""
    num_bytes = folder.size(name)
    if num_bytes > DOCUMENT_BYTES:
        raise CorruptShardError(
            f"{folder}/{name}: {num_bytes} bytes long, expected at most {DOCUMENT_BYTES}.\n{REMEDY}"
        )
    return folder.read(name)


def open_sealed(content: bytes, place: str) -> Document:
    """The document inside; raises `CorruptShardError` when any byte differs from what `seal_document`
    wrote.
    """
    document = parse_document(content, place)
    seal = document.pop("sha256", None)
    try:
        is_whole = seal == digest_json(document) and seal_document(document) == content
    except (ValueError, RecursionError):  # NaN, infinity or a lone surrogate, which json reads but JSON lacks
        is_whole = False
    if not is_whole:
        raise CorruptShardError(f"{place}: its content does not match its own digest.\n{REMEDY}")
    return document


def parse_document(content: bytes, place: str) -> Document:
    """A JSON object, or `CorruptShardError`."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptShardError(
            f"{place}: not JSON ({error}).\nDelete it and run `dpo-cache precompute` again."
        ) from error
    if not isinstance(document, dict):
        raise CorruptShardError(f"{place}: expected a JSON object, found {type(document).__name__}.")
    return document
