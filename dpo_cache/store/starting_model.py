"""The model that a run starts from by default: the one that the reference's entry in the cache names.

The maker of the cache chose that name. A commit of a Hub repository and an absolute path mean one thing; a
relative path means a folder wherever the command is run, and a Hub id without a commit whatever its owner
puts there tomorrow. Those two are used only from an entry that this user published.
"""

from __future__ import annotations

import os
import re

from dpo_cache.errors import ModelError, printable
from dpo_cache.files.locations import is_absolute
from dpo_cache.store.format.documents import Document
from dpo_cache.store.own_documents import is_own

HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
COMMIT = re.compile("[0-9a-f]{40}")
ADVICE = "Name the model that the policy starts from with `model`."


def default_start(reference: Document, *, checks_place: bool = True) -> tuple[str, str | None]:
    """Location and revision of the model in a reference's entry. Raises `ModelError` where it names none, or
    one that the user must name.

    Without `checks_place` only the name counts, as in a resumed run, which reads nothing from there.
    """
    source, identity = reference["provenance"], reference["identity"]
    location, revision = source.get("model"), source.get("revision")
    if location is None:
        imported = identity.get("imported")
        problem = (
            f"the reference {printable(repr(imported))} was imported without a checkpoint"
            if imported
            else "the reference was a model in memory, not a checkpoint"
        )
        raise ModelError(f"{problem}.\n{ADVICE}")
    if not _is_name(location) or not (revision is None or _is_name(revision)):
        raise ModelError(
            f"the reference's entry in the cache names {printable(repr(location)):.80} at revision "
            f"{printable(repr(revision)):.80}, which is not a path or Hub id.\n{ADVICE}"
        )
    if checks_place:
        _check_place(location, revision, is_own_entry=is_own(reference))
    return location, revision


def describe_start(location: str, revision: str | None) -> str:
    """The location with its revision, for a remark."""
    is_hub = revision is not None and not os.path.isdir(location)
    return f"{printable(location)} at revision {printable(revision)[:12]}" if is_hub else printable(location)


def is_ambiguous(location: str, revision: str | None = None) -> bool:
    """Return whether the name means another model elsewhere or later: a relative path, or a Hub id without a
    commit.
    """
    if os.path.isabs(location):
        return False
    return _is_relative_path(location) or revision is None or not COMMIT.fullmatch(revision)


def _check_place(location: str, revision: str | None, *, is_own_entry: bool) -> None:
    if is_absolute(location) and not os.path.isdir(location):
        raise ModelError(f"the reference's checkpoint {location} is gone.\n{ADVICE}")
    if is_ambiguous(location, revision) and not is_own_entry:
        what = "a relative path" if _is_relative_path(location) else "a Hub id without a commit"
        raise ModelError(
            f"the cache names {location} as the model to start from, {what}, and this user did not make its "
            "entry: it could be any model.\n"
            f"If it is the one you want, give `model` {location}."
        )


def _is_relative_path(location: str) -> bool:
    """Return whether a location that is no absolute path is a path: a folder of a Hub id's name is read
    before the Hub is.
    """
    return os.path.exists(location) or not HUB_ID.fullmatch(location)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()
