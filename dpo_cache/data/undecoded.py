"""Images, audio and videos of a data set: which columns hold them; they are read as stored, not decoded."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

MEDIA = {"Image": "image", "Audio": "audio", "Video": "video", "Pdf": "file", "Nifti": "file"}  # by feature


def media_columns(rows: Any) -> dict[str, str]:
    """The medium of each column whose type is an image, audio, a video or a file, or a list of these."""
    features = getattr(rows, "features", None) or {}
    return {name: medium for name, feature in features.items() if (medium := _medium(feature))}


def without_decoding(rows: Any) -> Any:
    """The rows; each image, sound and video of a `Dataset` or `IterableDataset` is a dict of bytes, path."""
    features = getattr(rows, "features", None)
    if not isinstance(rows, (Dataset, IterableDataset)) or not features or not _is_decoded(features):
        return rows
    stored = Features({name: _undecoded(feature) for name, feature in features.items()})
    if isinstance(rows, IterableDataset):
        return rows.cast(stored)
    info = rows.info.copy()
    info.features = stored
    return Dataset(rows.data, info, rows.split, rows._indices, rows._fingerprint)


def table_of_rows(rows: list[Any], features: Features) -> Dataset:
    """The rows of a stream as a table. Stored media are not encoded again, which needs packages for it."""
    plain = Features({name: _as_stored(feature) for name, feature in features.items()})
    table = Dataset.from_list(rows, plain)
    return table if plain == features else table.cast(features)


def _as_stored(feature: Any) -> Any:
    """The same feature with objects of bytes and path in place of media."""
    if isinstance(feature, dict):
        return {name: _as_stored(member) for name, member in feature.items()}
    if isinstance(feature, list):
        return [_as_stored(member) for member in feature]
    if hasattr(feature, "feature"):
        changed = copy.copy(feature)
        changed.feature = _as_stored(feature.feature)
        return changed
    is_medium = type(feature).__name__ in ("Image", "Audio", "Video")
    return {"bytes": Value("binary"), "path": Value("string")} if is_medium else feature


def _medium(feature: Any) -> str | None:
    members = [] if isinstance(feature, dict) else _members(feature)
    return _medium(members[0]) if members else MEDIA.get(type(feature).__name__)


def _is_decoded(feature: Any) -> bool:
    return any(map(_is_decoded, _members(feature))) or bool(getattr(feature, "decode", False))


def _undecoded(feature: Any) -> Any:
    """The same feature, whose Arrow type is the same, too."""
    if isinstance(feature, dict):
        return {name: _undecoded(member) for name, member in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(member) for member in feature]
    changed = copy.copy(feature)
    if hasattr(feature, "feature"):
        changed.feature = _undecoded(feature.feature)
    elif hasattr(feature, "decode") and not callable(feature.decode):
        changed.decode = False
    return changed


def _members(feature: Any) -> list[Any]:
    if isinstance(feature, dict):
        return list(feature.values())
    return feature if isinstance(feature, list) else [feature.feature] if hasattr(feature, "feature") else []
