"""Images, audio and videos of a data set are read as they are stored, and not decoded."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, Features, IterableDataset


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
