"""The cache folder as a whole.

    CACHE/
      format.json                          {"format": "dpo-cache", "version": 1}
      references/<id>/reference.json       sealed: identity and provenance; <id> is the identity's digest
      references/<id>/scores/              see `shards.py`
      pairs/<name>/<split>/                see `pairs.py`

Opening checks format.json; nothing here loads torch, takes a lock or unpickles.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from dpo_cache.errors import (
    CorruptShardError,
    FormatError,
    MissingFileError,
    NewerFormatError,
    NotInCacheError,
    OptionError,
)
from dpo_cache.store.folders.folder import Folder, open_folder
from dpo_cache.store.format.differing_fields import differing_fields
from dpo_cache.store.format.documents import (
    REMEDY,
    Document,
    digest_json,
    parse_document,
    read_bounded,
    read_sealed,
    render_document,
    seal_document,
)
from dpo_cache.store.format.member_kinds import REFERENCE, wrong_members
from dpo_cache.store.format.pair_tables import read_manifest
from dpo_cache.store.index import ScoreIndex
from dpo_cache.store.own_documents import note_own
from dpo_cache.store.pairs import PairSet, PairSetWriter
from dpo_cache.suggestions import checks_keywords

FORMAT = {"format": "dpo-cache", "version": 1}
ID_PATTERN = re.compile("[0-9a-f]{64}")  # the id of a reference
NAMED_PLACES = ("model", "revision", "tokenizer")  # in a provenance
# names of devices on Windows, also with an ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))}
NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@checks_keywords
def open_cache(location: str | os.PathLike[str], *, create: bool = False) -> Cache:
    """The cache at a path or fsspec URL. With `create`, an empty or missing folder becomes one when it is
    first written.

    Raises `FormatError` for a folder that is no cache or was made by a newer dpo-cache.
    """
    return Cache(location, create=create)


class Cache:
    """An open cache: references with their scores, and pair sets.

    `cache.pairs("NAME/SPLIT")` opens a pair set; `cache.pair_sets()` and `cache.references()` list the names.
    """

    def __init__(self, location: str | os.PathLike[str], *, create: bool = False):
        self.folder = open_folder(location)
        self._is_new = not self.folder.exists("format.json") and self._may_create(create)
        if not self._is_new:
            self._check_format(read_bounded(self.folder, "format.json"))

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:  # reads nothing: the folder may be a remote one
        return f"<Cache {self}>"

    def _repr_html_(self) -> str:
        from dpo_cache.store.html import cache_html  # which imports this module

        return cache_html(self)

    def __fspath__(self) -> str:  # an open cache works where a location is expected
        return str(self.folder)

    # -- references ------------------------------------------------------------------------------------

    def references(self) -> list[str]:
        """Ids of the references that have an entry here."""
        return [
            name
            for name in self.folder.names("references")
            if ID_PATTERN.fullmatch(name) and self.folder.exists(f"references/{name}/reference.json")
        ]

    def find_reference(self, prefix: str) -> str:
        """The one full id that starts with these characters."""
        if len(prefix) == 64 and self.folder.exists(f"references/{prefix}/reference.json"):
            return prefix  # a listing may lag behind
        matches = [reference_id for reference_id in self.references() if reference_id.startswith(prefix)]
        if len(matches) == 1:
            return matches[0]
        problem = "no reference" if not matches else f"{len(matches)} references"
        known = ", ".join(reference_id[:12] for reference_id in self.references()) or "none"
        raise NotInCacheError(
            f"{self}: {problem} whose id starts with {prefix!r}.\nKnown references: {known}."
        )

    def read_reference(self, reference_id: str) -> Document:
        """`{"identity": ..., "provenance": ...}`, checked against its seal and its id."""
        return read_reference(self.folder, reference_id)

    def publish_reference(self, identity: Document, provenance: Document) -> str:
        """Publish a reference's entry, unless it is here already. Returns its id.

        Either way the entry counts as this user's own, see `own_documents.py`; one that is here only if it
        names the same model.
        """
        reference_id = digest_json(identity)
        name = f"references/{reference_id}/reference.json"
        document = {"identity": identity, "provenance": provenance}
        try:
            present = self.read_reference(reference_id)  # raises where it is damaged
        except (NotInCacheError, MissingFileError):  # the second if it was removed in this moment
            self.publish_format()
            self.folder.publish(name, seal_document(document))
            note_own(document)
        else:
            if all(present["provenance"].get(place) == provenance.get(place) for place in NAMED_PLACES):
                note_own(present)
        return reference_id

    def replace_provenance(self, reference_id: str, provenance: Document) -> None:
        """Publish the entry of a reference that is here with other details of where it came from."""
        document = {**self.read_reference(reference_id), "provenance": provenance}
        self.folder.publish(f"references/{reference_id}/reference.json", seal_document(document))
        note_own(document)

    def scores(self, reference_id: str) -> ScoreIndex:
        """The scores of a reference; empty for one that is not here."""
        return ScoreIndex(self.folder, f"references/{reference_id}/scores")

    # -- pair sets -------------------------------------------------------------------------------------

    def pair_sets(self) -> list[str]:
        """`NAME/SPLIT` of every pair set; folders of other names than the format allows are none."""
        return [
            f"{name}/{split}"
            for name in filter(NAME_PATTERN.fullmatch, self.folder.names("pairs"))
            for split in filter(NAME_PATTERN.fullmatch, self.folder.names(f"pairs/{name}"))
            if self.folder.exists(f"pairs/{name}/{split}/manifest.json")
        ]

    def pairs(self, name: str) -> PairSet:
        """The pair set `NAME/SPLIT`; `NAME` is enough where it has one split, or a split called train."""
        # by its name first: a listing may lag behind
        matches = [pair_set for pair_set in (name, f"{name}/train") if self.holds_pairs(pair_set)][:1]
        known = [] if matches else self.pair_sets()
        matches += [pair_set for pair_set in known if pair_set.startswith(f"{name}/")]
        if len(matches) != 1:
            problem = f"no pair set {name!r}" if not matches else f"{name!r} has several splits"
            raise NotInCacheError(f"{self}: {problem}.\nIt holds: {', '.join(known) or 'no pair sets'}.")
        place = f"pairs/{matches[0]}"
        return PairSet(self.folder, place, read_manifest(self.folder, place))

    def choose_pairs(self, name: str | None, purpose: str, *, besides: str | None = None) -> PairSet:
        """The pair set of this name or, without a name, the only pair set other than `besides`.

        The error message names the `purpose`, such as "to train on". Raises `CacheError`.
        """
        if name:
            return self.pairs(name)
        known = [pair_set for pair_set in self.pair_sets() if pair_set != besides]
        if len(known) == 1:
            return self.pairs(known[0])
        if known:
            raise NotInCacheError(
                f"{self}: several pair sets {purpose}.\nName one with `pairs`: {', '.join(known)}."
            )
        if besides:
            raise NotInCacheError(f"{self}: no pair set {purpose} besides {besides}.\nName one with `pairs`.")
        raise NotInCacheError(
            f"{self}: no pair set {purpose}.\nRun `dpo-cache precompute --cache {self} …` first."
        )

    def check_scored_by(self, pairs: PairSet, reference: str) -> None:
        """Raise `CacheError` unless the reference whose id begins with `reference` scored a pair set."""
        expected = self.find_reference(reference)
        if expected == pairs.reference_id:
            return
        identities = [
            self.read_reference(reference_id)["identity"] for reference_id in (pairs.reference_id, expected)
        ]
        raise NotInCacheError(
            f"pair set {pairs.name} was scored by reference {pairs.reference_id[:12]}, not by "
            f"{reference}; they differ in\n"
            + "".join(f"  {line}\n" for line in differing_fields(*identities))
            + "Leave `reference` out, or run `dpo-cache precompute` with that model and another `name`."
        )

    def holds_pairs(self, name: str) -> bool:
        """Return whether the pair set `NAME/SPLIT` is here."""
        parts = name.split("/")
        is_allowed = len(parts) == 2 and all(map(NAME_PATTERN.fullmatch, parts))
        return is_allowed and self.folder.exists(f"pairs/{name}/manifest.json")

    def publish_manifest(self, manifest: Document) -> int:
        """Publish the manifest of a pair set whose parts are here; returns its size in bytes."""
        content = seal_document(manifest)
        self.folder.publish(f"pairs/{manifest['name']}/{manifest['split']}/manifest.json", content)
        note_own(manifest)
        return len(content)

    def write_pairs(self, name: str, split: str) -> PairSetWriter:
        """A writer for the pair set `name/split`; it replaces one of that name when it finishes."""
        check_name(name)
        check_name(split)
        self.publish_format()
        return PairSetWriter(self.folder, f"pairs/{name}/{split}")

    # -- the folder itself -----------------------------------------------------------------------------

    def publish_format(self) -> None:
        """Make the folder a cache, unless it is one."""
        if self._is_new:
            self.folder.publish("format.json", render_document(FORMAT))
            self._is_new = False

    def check_writable(self, names: Iterable[str] = ()) -> None:
        """Raise `StorageError` where files of these names, or a new cache, cannot be written."""
        wanted = [*(["format.json"] if self._is_new else []), *names]
        if wanted:
            self.folder.check_writable(wanted)

    def _may_create(self, create: bool) -> bool:
        """Raise `FormatError` where no cache may be made here; False where another writer has just made
        it.
        """
        if not create:
            raise FormatError(
                f"{self}: no dpo-cache here ({_why_not(str(self))}).\n"
                f"Check the path, or run `dpo-cache precompute --cache {self} …` to make one."
            )
        present = self.folder.names("")
        if "format.json" in present:
            return False
        if present and not set(present) <= {"references", "pairs"}:
            shown = ", ".join(present[:5])
            raise FormatError(
                f"{self}: the folder holds other things ({shown}) and no format.json.\n"
                "Choose an empty or new folder for `cache`."
            )
        return True

    def _check_format(self, content: bytes) -> None:
        if content == render_document(FORMAT):
            return
        found = parse_document(content, f"{self}/format.json")
        if (
            found.get("format") == FORMAT["format"]
            and isinstance(found.get("version"), int)
            and found["version"] > FORMAT["version"]
        ):
            raise NewerFormatError(
                f"{self}: made by a newer dpo-cache (cache format {found['version']}, this one reads "
                f"{FORMAT['version']}).\n"
                "Run `pip install --upgrade dpo-cache`, or choose another `cache`."
            )
        raise FormatError(f"{self}/format.json: expected {FORMAT}, found {found}.")


def _why_not(location: str) -> str:
    """Why a location is no cache, in a few words."""
    path = Path(location)
    if "://" in location or path.is_dir():
        return "no format.json"
    return "it is a file" if path.exists() else "no such folder"


def read_reference(folder: Folder, reference_id: str) -> Document:
    """The reference's entry in a cache folder, checked against its seal and its id."""
    name = f"references/{reference_id}/reference.json"
    if not folder.exists(name):
        raise NotInCacheError(
            f"{folder}: no reference {reference_id}.\nRun `dpo-cache precompute` to score it."
        )
    document = read_sealed(folder, name)
    is_shaped = document.keys() == {"identity", "provenance"} and all(
        isinstance(member, dict) for member in document.values()
    )
    if not is_shaped or digest_json(document["identity"]) != reference_id:
        raise CorruptShardError(f"{folder}/{name}: its identity does not hash to {reference_id}.")
    if wrong := wrong_members(document, REFERENCE):
        raise CorruptShardError(f"{folder}/{name}: its member {wrong[0]} is of the wrong kind.\n{REMEDY}")
    return document


def check_name(name: str) -> str:
    """The name, if a path of the cache may contain it. Raises `OptionError`."""
    if not NAME_PATTERN.fullmatch(name):
        raise OptionError(
            f"{name!r} cannot name a pair set: use letters, digits, '.', '_' and '-', at most 128, not "
            "starting with '.' or '-'."
        )
    if name.partition(".")[0].lower() in DEVICES or name.endswith("."):
        raise OptionError(
            f"{name!r} cannot name a pair set: Windows has no folder of this name, and caches are shared.\n"
            "Choose another name."
        )
    return name
