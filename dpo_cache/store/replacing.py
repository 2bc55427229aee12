"""May a pair set take the place of the one that has its name?

It may if both come from one source under one reference: rows were added, the truncation changed, imported
values were corrected. A pair set of another source or reference is somebody's other pair set, and is replaced
only with `overwrite`. A copy of the source elsewhere that makes the same pairs is no other source.
"""

from __future__ import annotations

import os

from dpo_cache.errors import CacheError, NotInCacheError, printable
from dpo_cache.store.cache import Cache
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import Document
from dpo_cache.store.pairs import PairSet

SETTINGS = ("source", "tokenization")  # members of a manifest that do not determine its pairs and values


def check_replaceable(
    cache: Cache, details: Document, identity: Document, *, overwrite: bool, former_id: str | None = None
) -> None:
    """Raise `CacheError` if a pair set of that name is here that may not be replaced without `overwrite`.

    `details` are those of the new manifest; before the pairs are known, without `pairs_digest`. `identity` is
    that of its reference, which may have had a `former_id`.
    """
    name = f"{details['name']}/{details['split']}"
    if not cache.holds_pairs(name):
        return
    old = cache.pairs(name)  # raises where its manifest is damaged
    if overwrite:
        return
    differing = _differing_source(old.manifest, details)
    if old.reference_id not in (details["reference"], former_id):
        differing += differing_reference(cache, old.reference_id, identity)
    elif has_same_pairs(old, details):
        return
    if differing:
        raise CacheError(
            f"{cache}: there is another pair set {name}, of {len(old):,} pairs; it and the new one differ "
            "in\n"
            + "".join(f"  {line}\n" for line in differing)
            + "Give the new one another `name`, or replace the other one with `overwrite`."
        )


def has_same_pairs(old: PairSet, details: Document) -> bool:
    """Return whether a pair set holds these pairs in this order, under the same reference."""
    return "pairs_digest" in details and all(
        old.manifest.get(name) == details[name] for name in ("reference", "pairs_digest")
    )


def differing_settings(old: PairSet, details: Document) -> list[str]:
    """A line for each setting with which the same pairs were made in another way, such as `max_length`."""
    before, now = (
        {name: manifest.get(name, {}) for name in SETTINGS} for manifest in (old.manifest, details)
    )
    return differing_fields(*({**one, "source": _undated(one["source"])} for one in (before, now)))


def renewed_manifest(old: PairSet, details: Document) -> Document:
    """The pair set's manifest with these details: its parts stay, and so does what was audited of them."""
    kept = ("format", "num_pairs", "parts", "audit")
    return {
        **{name: value for name, value in details.items() if name != "audit"},
        **{name: old.manifest[name] for name in kept if name in old.manifest},
    }


def describe_replacement(cache: Cache, old: PairSet, details: Document, identity: Document) -> str:
    """The remark on a pair set that a new one replaces: what it held, and what differs. The details are those
    of the new one, the identity is that of its reference.
    """
    is_other = old.reference_id != details["reference"]
    differing = differing_reference(cache, old.reference_id, identity) if is_other else []
    differing += differing_settings(old, details)
    if differing:
        why = f"before and now differ in {'; '.join(differing)}"
    elif is_other:
        why = "it has other log-probs now"
    elif has_same_pairs(old, details):
        why = "parts of it are gone or damaged"
    else:
        why = "its source has other rows now"
    held = f"{len(old)} pairs of reference {old.reference_id[:12]}"
    return f"pair set {old.name} is replaced: it held {held}; {why}."


def differing_reference(cache: Cache, old_id: str, identity: Document) -> list[str]:
    """A line for each field in which the reference of this id differs from an identity. Values that were
    imported under one name and dtype are of one reference, whatever they are.
    """
    try:
        before = cache.read_reference(old_id)["identity"]
    except NotInCacheError:
        return [f"reference: {old_id[:12]}, which is not here, and another"]
    return differing_fields(
        *(
            {name: value for name, value in one.items() if name != "values" or "imported" not in one}
            for one in (before, identity)
        )
    )


def _differing_source(manifest: Document, details: Document) -> list[str]:
    before, now = manifest.get("source", {}), details["source"]
    if before.get("rows_of") == now.get("rows_of") == "memory":
        return []  # rows in memory have no name by which they could be compared
    places = [str(source.get("dataset", "none")) for source in (before, now)]
    one, other = (os.path.realpath(place) if os.path.isabs(place) else place for place in places)
    return [] if one == other else [f"source: {printable(places[0])} and {printable(places[1])}"]


def _undated(source: Document) -> Document:
    return {name: value for name, value in source.items() if name != "created"}
